"""What comes before the workers in the simulation: the router's line, and who computes a prompt."""

from __future__ import annotations

from dataclasses import replace

from baton.config_admission import AdmissionConfig, ClassConfig
from placement import entry
from placement.cluster import Cluster, Pool
from placement.linear import LinearCost
from placement.outcome import End, Outcome
from placement.replica import EngineLimits
from placement.simulator import simulate
from placement.workload import Arrival
from router import entry as routers

COST = LinearCost(base_s=0.01, prefill_token_s=0.001, sequence_s=0.0, context_token_s=0.0)
PROMISED = AdmissionConfig(classes={"standard": ClassConfig(ttft_ms=500.0)})


def burst(requests: int) -> list[Arrival]:
    """A warm-up, then many at once."""
    return [Arrival(0.0, 100, 5), *(Arrival(5.0 + 1e-3 * n, 100, 5) for n in range(requests))]


def late(outcome: Outcome) -> int:
    return sum(trip.ttft_s > 0.5 for trip in outcome.trips if trip.end is End.FINISHED)


def computed_by_decode_workers(outcome: Outcome) -> int:
    """Prompt tokens."""
    return sum(use.entered_tokens for name, use in outcome.workers.items() if name.startswith("decode"))


def test_it_looks_at_the_line_as_often_as_the_router() -> None:
    assert (entry.TICK_S, entry.FEWEST_GAPS) == (routers.TICK_S, routers.FEWEST_GAPS)


def test_what_cannot_be_in_time_is_refused_and_the_rest_is_in_time() -> None:
    cluster = Cluster(Pool(COST, 1), Pool(COST, 1))
    all_in, promised = simulate(cluster, burst(20)), simulate(replace(cluster, admission=PROMISED), burst(20))
    assert all_in.count(End.FINISHED) == 21
    assert late(all_in) > 10
    assert 3 <= promised.count(End.FINISHED) < 21
    assert promised.count(End.FINISHED) + promised.count(End.REFUSED) == 21
    assert late(promised) == 0


def test_without_promises_everybody_is_served_though_not_at_once() -> None:
    cluster = Cluster(Pool(COST, 1), Pool(COST, 1), admission=AdmissionConfig())
    outcome = simulate(cluster, burst(20))
    assert outcome.count(End.FINISHED) == 21
    firsts = [trip.first_token_s for trip in outcome.trips]
    assert firsts == sorted(firsts)


def test_decode_workers_compute_prompts_when_the_line_at_the_prefill_worker_is_long() -> None:
    cluster = Cluster(Pool(COST, 2, EngineLimits(gap_s=0.3)), Pool(COST, 1, EngineLimits(step_tokens=100)))
    helped = replace(cluster, local_prefill=True)
    busy = [Arrival(0.0, 100, 5), *(Arrival(5.0 + 0.05 * n, 100, 5) for n in range(30))]
    alone, shared = simulate(cluster, busy), simulate(helped, busy)
    assert computed_by_decode_workers(alone) == 0
    assert 500 <= computed_by_decode_workers(shared) < 31 * 100
    assert shared.percentiles(0.9)[0] < 0.7 * alone.percentiles(0.9)[0]
    assert shared.count(End.FINISHED) == 31
    calm = [Arrival(1.0 * n, 100, 5) for n in range(5)]
    assert simulate(helped, calm) == simulate(cluster, calm)


def test_prompts_stretch_the_gaps_of_streams_as_far_as_the_configuration_allows() -> None:
    arrivals = [Arrival(0.0, 10, 60), Arrival(0.2, 400, 2)]

    def gap_and_wait(limits: EngineLimits) -> tuple[float, float]:
        stream, prompt = simulate(Cluster(Pool(COST, 1, limits)), arrivals).trips
        return stream.tpot_s, prompt.ttft_s

    steady, quick = gap_and_wait(EngineLimits(gap_s=0.03)), gap_and_wait(EngineLimits(gap_s=0.3))
    fixed = gap_and_wait(EngineLimits(mixed_tokens=32))
    assert steady[1] > quick[1]
    assert fixed[1] > 400 / 32 * (0.01 + 0.032) - 1e-9
    assert steady[1] > 400 / 16 * 0.026 - 1e-9  # blocks of 16 tokens: two of them pass 30 ms


def test_a_request_reaches_a_busy_decode_worker_between_two_steps() -> None:
    slow = LinearCost(base_s=0.5, prefill_token_s=0.0, sequence_s=0.0, context_token_s=0.0)
    cluster = Cluster(Pool(slow, 1), Pool(COST, 1))
    busy = simulate(cluster, [Arrival(0.0, 100, 10), Arrival(1.0, 100, 2)]).trips
    step_ends_s = 0.11 + 0.5 * 2
    assert busy[1].first_token_s >= step_ends_s + 0.11 - 1e-9
