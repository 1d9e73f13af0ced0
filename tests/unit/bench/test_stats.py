"""Latencies, percentiles, attainment and goodput."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import stats
from bench.stats import Goodput, Record, Slo

SLO = Slo(ttft_s=0.5, tpot_s=0.1)


def record(*times_s: float, due_s: float = 1.0, asked: int | None = None, status: str = "OK", **more: object) -> Record:
    output = len(times_s) if asked is None else asked
    return Record(0, due_s, due_s + 0.01, 10, output, status, token_times_s=times_s, **more)  # type: ignore[arg-type]


def test_latencies_count_from_when_the_request_was_due() -> None:
    one = record(1.2, 1.3, 1.3, 1.5)
    assert one.ttft_s == pytest.approx(0.2)
    assert one.tpot_s == pytest.approx(0.1)
    assert one.itls_s == pytest.approx([0.1, 0.0, 0.2])
    assert one.e2e_s == pytest.approx(0.5)
    assert one.lag_s == pytest.approx(0.01)


def test_a_request_without_tokens_never_met_anything() -> None:
    refused = record(asked=4, status="RESOURCE_EXHAUSTED")
    assert math.isinf(refused.ttft_s)
    assert math.isinf(refused.e2e_s)
    assert not refused.ok
    assert not SLO.met(refused)


def test_a_short_answer_is_not_a_good_one() -> None:
    assert not record(1.1, 1.2, asked=3).ok


@pytest.mark.parametrize(
    ("times_s", "met"),
    [
        ((1.5, 1.6), True),  # both at their limit
        ((1.6, 1.61), False),  # first token late
        ((1.1, 1.4), False),  # tokens too slow
        ((1.4,), True),  # one token has no pace
    ],
)
def test_the_objective_is_joint(times_s: tuple[float, ...], met: bool) -> None:
    slack = Slo(SLO.ttft_s + 1e-9, SLO.tpot_s + 1e-9)
    assert slack.met(record(*times_s)) is met


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_equal_numpys(values: list[float], percent: float) -> None:
    assert stats.percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-6)


def test_nothing_measured_has_no_percentile() -> None:
    assert math.isnan(stats.percentile([], 50))
    assert stats.distribution([]) == {}


def test_distribution_is_in_milliseconds() -> None:
    assert stats.distribution([0.1, 0.2, 0.3]) == pytest.approx(
        {"mean": 200.0, "p50": 200.0, "p90": 280.0, "p99": 298.0}
    )


def test_refused_and_failed_requests_count_as_misses() -> None:
    records = [
        record(1.1, 1.15),
        record(asked=2, status="RESOURCE_EXHAUSTED"),
        record(1.1, status="UNAVAILABLE", asked=2),
    ]
    assert stats.attainment(records, SLO) == pytest.approx(1 / 3)
    assert stats.attainment([], SLO) == 0.0


def test_summary_of_a_run() -> None:
    records = [
        record(
            1.2, 1.4, due_s=1.0, stages={"prefill": 0.2, "decode": 0.2}, transfer_busy_s=0.1, transfer_exposed_s=0.02
        ),
        record(
            2.4, 3.0, due_s=2.0, stages={"prefill": 0.4, "decode": 0.6}, transfer_busy_s=0.1, transfer_exposed_s=0.04
        ),
        record(asked=2, due_s=2.5, status="RESOURCE_EXHAUSTED"),
    ]
    shown = stats.summary(records, SLO)
    assert (shown["requests"], shown["completed"]) == (3, 2)
    assert shown["by_status"] == {"OK": 2, "RESOURCE_EXHAUSTED": 1}
    assert shown["span_s"] == pytest.approx(2.0)
    assert shown["output_tokens_per_s"] == pytest.approx(2.0)
    assert shown["ttft_ms"]["p50"] == pytest.approx(300.0)  # type: ignore[index]
    assert shown["mean_stages_ms"]["prefill"] == pytest.approx(300.0)  # type: ignore[index]
    assert shown["mean_stages_ms"]["wire"] == 0.0  # type: ignore[index]
    assert shown["transfer_hidden_share"] == pytest.approx(0.7)


def test_summary_of_nothing() -> None:
    shown = stats.summary([], SLO)
    assert shown["requests"] == 0
    assert shown["requests_per_s"] == 0.0
    assert shown["ttft_ms"] == {}
    assert shown["mean_stages_ms"] == {}
    assert shown["transfer_hidden_share"] is None


@pytest.mark.parametrize(
    ("points", "reached"),
    [
        ([], Goodput(0.0, bounded=False)),
        ([(1.0, 1.0), (2.0, 0.9)], Goodput(2.0, bounded=False)),
        ([(2.0, 0.89), (1.0, 0.95)], Goodput(1.0, bounded=True)),
        ([(1.0, 0.5), (2.0, 1.0)], Goodput(0.0, bounded=True)),  # luck above a miss does not count
    ],
)
def test_goodput(points: list[tuple[float, float]], reached: Goodput) -> None:
    assert stats.goodput(points) == reached
