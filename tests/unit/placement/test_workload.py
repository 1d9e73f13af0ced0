"""Traces in, arrivals out; drawn workloads; descriptions that match what is known of the traces."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from baton.errors import ConfigError
from placement import report, traces
from placement.synthetic import Bursts, Gamma, LogNormalLengths, ObservedLengths, Poisson, draw, like
from placement.workload import Arrival, Workload, describe, page_keys, prefix_share

TRACES = Path(__file__).parents[4] / "shared" / "data" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason=f"no traces in {TRACES}")
LENGTHS = ObservedLengths(((100, 10), (1000, 3)))


@needs_traces
def test_azure_conversations_are_as_published() -> None:
    described = describe(traces.load(TRACES / "azure_2023_conv.csv"))
    assert described.requests == 19366
    assert described.rate == pytest.approx(5.53, abs=0.01)
    assert described.gap_cv == pytest.approx(1.09, abs=0.01)
    assert (described.prompt.mean, described.output.mean) == pytest.approx((1155, 211), abs=1)
    assert described.prefix_share is None


@needs_traces
@pytest.mark.parametrize(("name", "share"), [("conversation", 0.3664), ("synthetic", 0.6396)])
def test_mooncake_prefix_shares_are_as_computed_for_an_unbounded_cache(name: str, share: float) -> None:
    assert prefix_share(traces.load(TRACES / f"mooncake_{name}.jsonl")) == pytest.approx(share, abs=5e-5)


def test_our_own_records_come_back(tmp_path: Path) -> None:
    arrivals = (Arrival(0.0, 5, 7), Arrival(1.25, 9, 1))
    path = tmp_path / "ours.jsonl"
    path.write_text("".join(traces.record(arrival) + "\n" for arrival in arrivals))
    assert traces.load(path).arrivals == arrivals


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,x,4\n", "line 2"),
        ("a.csv", "A,B\n1,2\n", "lacks"),
        ("a.jsonl", '{"arrived_s": 1, "prompt_tokens": 4}\n', "line 1"),
        ("a.jsonl", '{"arrived_s": 1, "prompt_tokens": 4, "output_tokens": 1}\n[1]\n', "line 2"),
        ("a.jsonl", '{"arrived_s": NaN, "prompt_tokens": 4, "output_tokens": 1}\n', "line 1"),
        ("a.jsonl", "\n", "no requests"),
        ("a.txt", "", "a workload is"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path: Path, name: str, text: str, line: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=line):
        traces.load(tmp_path / name)


def test_seven_decimals_of_a_second_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = ("2023-11-16 18:15:46.0000000,1,1", "2023-11-16 18:15:47.2500005,1,1")
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))
    assert traces.load(path).arrivals[1].at_s == pytest.approx(1.2500005, abs=1e-6)


@pytest.mark.parametrize(
    ("process", "low", "high"),
    [(Poisson(), 0.95, 1.05), (Gamma(3.0), 2.6, 3.4), (Gamma(0.5), 0.45, 0.55), (Bursts(8, 10, 40), 1.2, 4)],
)
def test_processes_have_their_rate_and_burstiness(process: Poisson | Gamma | Bursts, low: float, high: float) -> None:
    described = describe(draw("drawn", 20_000, 4.0, process, LENGTHS, seed=1))
    assert described.rate == pytest.approx(4.0, rel=0.12)
    assert low <= described.gap_cv <= high


def test_the_same_seed_draws_the_same() -> None:
    assert draw("a", 50, 1.0, Gamma(2), LENGTHS, seed=5) == draw("a", 50, 1.0, Gamma(2), LENGTHS, seed=5)
    assert draw("a", 50, 1.0, Gamma(2), LENGTHS, seed=5) != draw("a", 50, 1.0, Gamma(2), LENGTHS, seed=6)


def test_a_fitted_joint_distribution_keeps_means_and_correlation() -> None:
    true = LogNormalLengths((6.0, 4.0), (0.5, 0.7), -0.6, (10**6, 10**6))
    fitted = LogNormalLengths.fit(draw("drawn", 5000, 1.0, Poisson(), true, seed=2))
    assert fitted.means == pytest.approx(true.means, abs=0.05)
    assert fitted.deviations == pytest.approx(true.deviations, abs=0.05)
    assert fitted.correlation == pytest.approx(-0.6, abs=0.05)


def test_observed_pairs_stay_pairs() -> None:
    assert {(a.prompt_tokens, a.output_tokens) for a in draw("d", 100, 1, Poisson(), LENGTHS, seed=0).arrivals} == {
        (100, 10), (1000, 3),
    }  # fmt: skip


def test_a_likeness_has_the_traces_rate() -> None:
    trace = draw("drawn", 4000, 7.0, Gamma(2.0), LENGTHS, seed=1)
    described = describe(like(trace, 4000))
    assert described.rate == pytest.approx(7.0, rel=0.15)
    assert described.gap_cv == pytest.approx(2.0, rel=0.2)


def test_scaling_in_rate_keeps_burstiness_and_in_length_keeps_times() -> None:
    trace = draw("drawn", 500, 2.0, Gamma(2.0), LENGTHS, seed=1)
    faster, longer = trace.at_rate(10.0), trace.in_length(2.0, 0.01)
    assert faster.rate == pytest.approx(10.0)
    assert describe(faster).gap_cv == pytest.approx(describe(trace).gap_cv)
    assert {a.prompt_tokens for a in longer.arrivals} == {200, 2000}
    assert {a.output_tokens for a in longer.arrivals} == {1}
    assert [a.at_s for a in longer.arrivals] == [a.at_s for a in trace.arrivals]


def test_a_short_trace_is_repeated_at_its_own_rate() -> None:
    trace = draw("drawn", 100, 3.0, Poisson(), LENGTHS, seed=1)
    longer = trace.lasting(950)
    assert len(longer.arrivals) == 950
    assert longer.rate == pytest.approx(trace.rate, rel=0.02)
    assert all(a.at_s <= b.at_s for a, b in zip(longer.arrivals, longer.arrivals[1:], strict=False))


def test_one_instant_has_no_rate() -> None:
    instant = Workload("instant", (Arrival(0.0, 1, 1),))
    assert math.isnan(describe(instant).gap_cv)
    with pytest.raises(ConfigError):
        instant.at_rate(1.0)
    with pytest.raises(ConfigError):
        instant.fitting(1)


def test_a_workload_is_drawn_to_a_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.draw_workload(draw("drawn", 50, 1.0, Poisson(), LENGTHS, seed=0), tmp_path / "w.png")
    assert (tmp_path / "w.png").stat().st_size > 1000


def test_pages_are_named_by_the_block_that_they_end_in_and_by_their_end() -> None:
    arrival = Arrival(0.0, 20, 1, blocks=(7, 8, 9))
    fine, coarse = page_keys(arrival, 8, 4), page_keys(arrival, 8, 16)
    assert len(set(fine)) == len(fine) == 5
    assert fine[:4] == page_keys(Arrival(0.0, 16, 1, blocks=(7, 8)), 8, 4)  # what begins alike is named alike
    assert fine[:2] == page_keys(Arrival(0.0, 24, 1, blocks=(7, 5, 6)), 8, 4)[:2]
    assert set(fine[2:]).isdisjoint(page_keys(Arrival(0.0, 24, 1, blocks=(7, 5, 6)), 8, 4))
    assert coarse == (fine[3],)
    assert page_keys(Arrival(0.0, 20, 1), 8, 4) == ()


def test_a_repeated_workload_begins_with_new_prefixes() -> None:
    workload = Workload("w", (Arrival(0.0, 8, 1, (0, 1)), Arrival(1.0, 8, 1, (0, 2))), block_tokens=4)
    repeated = workload.lasting(4)
    assert [arrival.blocks for arrival in repeated.arrivals] == [(0, 1), (0, 2), (3, 4), (3, 5)]
    assert prefix_share(repeated) == prefix_share(workload)
