"""Arrivals, lengths and prompts of the load generator."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import workload
from bench.workload import Fixed, Planned, Uniform

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


@pytest.mark.parametrize(
    ("text", "means"), [("512", Fixed(512)), ("uniform:64:1024", Uniform(64, 1024)), ("1", Fixed(1))]
)
def test_lengths(text: str, means: workload.Lengths) -> None:
    assert workload.lengths(text) == means


@pytest.mark.parametrize("text", ["", "0", "-3", "x", "uniform:5", "uniform:9:5", "uniform:0:5", "1.5", "fixed:3"])
def test_other_lengths_are_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="such as 512"):
        workload.lengths(text)


def test_uniform_lengths_cover_their_range_and_no_more() -> None:
    rng = random.Random(1)
    assert {Uniform(3, 6).draw(rng) for _ in range(200)} == {3, 4, 5, 6}


def test_poisson_has_the_rate_and_the_spread_of_a_poisson_process() -> None:
    times = workload.poisson(4.0, 20_000, random.Random(7))
    gaps = [after - before for before, after in pairwise([0.0, *times])]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(0.25, rel=0.03)
    assert variance == pytest.approx(0.25**2, rel=0.06)  # an exponential's deviation is its mean
    assert min(gaps) >= 0.0


def test_a_trace_starts_at_zero_in_order_of_time() -> None:
    lines = [HEADER, "2023-11-16 18:15:50.9951690,396,109", "2023-11-16 18:15:46.6805900,374,44"]
    first, second = workload.parse_trace(lines, "t.csv")
    assert (first.at_s, first.prompt_tokens, first.output_tokens) == (0.0, 374, 44)
    assert second.at_s == pytest.approx(4.314579, abs=1e-5)
    assert (second.prompt_tokens, second.output_tokens) == (396, 109)


def test_timestamps_without_fraction() -> None:
    assert workload.timestamp("1970-01-01 00:01:00") == 60.0
    assert workload.timestamp("1970-01-01 00:00:00.2500000") == 0.25


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["A,B", "1,2"], "no column TIMESTAMP, ContextTokens, GeneratedTokens"),
        ([HEADER, "2023-11-16 18:15:46.68,374,44", "soon,1,2"], "t.csv, line 3"),
        ([HEADER, "2023-11-16 18:15:46.68,many,44"], "t.csv, line 2"),
        ([HEADER, "2023-11-16 18:15:46.68,5"], "t.csv, line 2"),
    ],
)
def test_a_bad_trace_names_the_place(lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workload.parse_trace(lines, "t.csv")


def test_stretching_keeps_sizes_and_the_shape_of_bursts() -> None:
    trace = [Planned(0.0, 1, 2), Planned(1.0, 3, 4), Planned(10.0, 5, 6)]
    stretched = workload.at_rate(trace, 0.5)
    assert [one.at_s for one in stretched] == pytest.approx([0.0, 0.4, 4.0])
    assert [(one.prompt_tokens, one.output_tokens) for one in stretched] == [(1, 2), (3, 4), (5, 6)]


def test_a_trace_of_one_moment_cannot_be_stretched() -> None:
    with pytest.raises(ValueError, match="two different times"):
        workload.at_rate([Planned(0.0, 1, 1), Planned(0.0, 1, 1)], 1.0)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(2, 10**5), st.integers(1, 10**5))
def test_clipped_requests_fit_the_context(prompt: int, output: int, context: int, max_output: int) -> None:
    clipped = workload.clip(Planned(1.5, prompt, output), context, max_output)
    assert clipped.at_s == 1.5
    assert clipped.prompt_tokens >= 1
    assert 1 <= clipped.output_tokens <= max_output
    assert clipped.prompt_tokens + clipped.output_tokens <= context
    if prompt >= 1 and 1 <= output <= max_output and prompt + output <= context:
        assert (clipped.prompt_tokens, clipped.output_tokens) == (prompt, output)


def test_prompts_are_allowed_ids_without_common_prefix() -> None:
    rng = random.Random(3)
    allowed = [5, 6, 7, 8, 9]
    prompts = [workload.prompt_ids(index, 20, allowed, rng) for index in range(5)]
    assert all(len(prompt) == 20 and set(prompt) <= set(allowed) for prompt in prompts)
    assert len({prompt[0] for prompt in prompts}) == 5
