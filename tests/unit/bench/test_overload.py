"""What counts as admitted, in time and refused at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from bench.front_log import Served
from bench.overload import MOST_RATES, row, sweep
from bench.stats import Record, Slo

SLO = Slo(1.0, 0.1)


def record(index: int, *, first_s: float = 0.0, status: str = "OK", reason: str = "", ended_s: float = 0.0) -> Record:
    times = (index + first_s, index + first_s + 0.05) if status == "OK" else ()
    return Record(
        index, float(index), float(index), 8, 2, status, token_times_s=times, ended_s=index + ended_s, reason=reason
    )


def test_whoever_is_shed_was_admitted_and_missed() -> None:
    full = "RESOURCE_EXHAUSTED"
    records = [
        record(0, first_s=0.5),
        record(1, first_s=1.5),  # late
        record(2, status=full, reason="TTFT", ended_s=0.01),
        record(3, status=full, reason="SHED", ended_s=0.9),
        record(4, status=full, reason="LINE_FULL", ended_s=0.03),
    ]
    figures = row(
        2.0, 3.0, records, [Served(500, 600), Served(8, 8), Served(890, 898), Served(11, 12), Served(9, 700)], SLO
    )
    assert (figures["requests"], figures["admitted"]) == (5, 3)
    assert figures["admitted_met_share"] == pytest.approx(1 / 3)
    assert figures["goodput_per_s"] == pytest.approx(1 / 4)
    assert figures["refused_within_20_ms"] == 0.5
    assert figures["refusal_ms"]["p50"] == pytest.approx(20.0)
    assert (figures["front_refused_within_20_ms"], figures["front_refusal_ms"]["p50"]) == (1.0, 10.0)
    assert figures["by_reason"] == {"OK": 2, "TTFT": 1, "SHED": 1, "LINE_FULL": 1}


def test_nobody_refused() -> None:
    figures = row(1.0, 0.5, [record(0, first_s=0.5), record(1, first_s=0.5)], [Served(500, 550), Served(500, 550)], SLO)
    assert (figures["refusal_ms"], figures["refused_within_20_ms"], figures["admitted_met_share"]) == ({}, 1.0, 1.0)


def service(goodput: Callable[[float], float]) -> Callable[[float], Awaitable[dict[str, Any]]]:
    async def measured(rate_per_s: float) -> dict[str, Any]:
        return {"rate_per_s": rate_per_s, "goodput_per_s": goodput(rate_per_s)}

    return measured


async def test_the_capacity_is_found_above_the_first_rate() -> None:
    """What serves all of up to 4/s and goes down after that, found from a guess that is too low."""
    rows = await sweep(service(lambda rate: min(rate, 4.0) - max(0.0, rate - 5.0) / 10), 1.5)
    assert max(one["goodput_per_s"] for one in rows) == pytest.approx(4.0, rel=0.1)
    assert [one["rate_per_s"] > 4.0 for one in rows[-3:]] == [True, True, True]
    assert rows[-1]["rate_per_s"] < 3 * 4.0


async def test_the_search_ends() -> None:
    assert len(await sweep(service(lambda rate: rate), 1.0)) == MOST_RATES
    assert len(await sweep(service(lambda rate: 0.0), 1.0)) == 2
