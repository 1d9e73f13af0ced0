"""Handoffs between processes that are killed, stopped and corrupted end whole or not at all (``bench.storm``)."""

from __future__ import annotations

import pytest

from bench.storm import ROUND, Storm, plans

WAYS = [("tcp", ""), ("nixl", ""), ("nixl", "tcp")]


def _survives(transport: str, ucx_tls: str, handoffs: int, seed: int) -> None:
    report = Storm(transport, seed, ucx_tls=ucx_tls).run(handoffs)
    assert report.wrong == []
    assert report.handoffs == handoffs == report.landed + report.lost
    assert report.landed >= handoffs // 4  # a storm in which nothing lands shows nothing
    assert report.lost > 0


@pytest.mark.parametrize(("transport", "ucx_tls"), WAYS)
def test_a_squall(transport: str, ucx_tls: str) -> None:
    _survives(transport, ucx_tls, 2 * ROUND if transport == "tcp" else ROUND, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize(("transport", "ucx_tls"), WAYS)
def test_a_storm(transport: str, ucx_tls: str) -> None:
    _survives(transport, ucx_tls, 1000, seed=11)


def test_a_storm_is_its_seed() -> None:
    first, again, other = ([*plans(seed, "tcp", 2 * ROUND)] for seed in (5, 5, 6))
    assert first == again != other
    assert [len(planned) for _, planned in first] == [ROUND, ROUND]
