"""The all-reduce bench runs both kinds between real processes."""

from __future__ import annotations

from bench import all_reduce


def test_both_kinds_are_measured_at_every_size() -> None:
    figures = all_reduce.measure(ranks=2, rows=(1, 600), hidden=128, rounds=20)
    assert [(one.kind, one.rows) for one in figures] == [("shared", 1), ("gloo", 1), ("shared", 600), ("gloo", 600)]
    for one in figures:
        assert one.ranks == 2
        assert 0.0 < one.p50_us <= one.p95_us
