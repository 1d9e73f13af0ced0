"""The simulator by hand-computed cases: times, links, failures, scaling, and what it shares with the real system."""

from __future__ import annotations

import pytest

from baton import plane
from baton.config_routing import Strategy
from placement import router_view
from placement.cluster import Change, Cluster, Pool
from placement.cost import StepShape, step_s
from placement.linear import LinearCost
from placement.outcome import End, Outcome, Slo
from placement.replica import EngineLimits
from placement.simulator import simulate
from placement.workload import Arrival

COST = LinearCost(base_s=0.01, prefill_token_s=0.001, sequence_s=0.0, context_token_s=0.0)


def run(cluster: Cluster, *requests: tuple[float, int, int], changes: tuple[Change, ...] = ()) -> Outcome:
    return simulate(cluster, [Arrival(*request) for request in requests], changes=changes)


def test_load_is_as_old_as_the_routers() -> None:
    assert router_view.LOAD_AGE_S == plane.LOAD_CHANGED_S


def test_one_request_alone_takes_prefill_handoff_and_its_decode_steps() -> None:
    cost = LinearCost(0.01, 0.001, 0.0, 0.0, transfer_token_s=0.0002)
    trip = run(Cluster(Pool(cost, 1), Pool(cost, 1)), (1.0, 100, 5)).trips[0]
    assert trip.ttft_s == pytest.approx(0.11)
    assert trip.handoff_s == pytest.approx(0.02)
    assert trip.last_token_s - trip.first_token_s == pytest.approx(0.02 + 4 * 0.01)
    assert trip.end is End.FINISHED


def test_hidden_transfer_delays_nothing_when_the_link_is_idle() -> None:
    cost = LinearCost(0.01, 0.001, 0.0, 0.0, transfer_token_s=0.0002, exposed=0.0)
    trip = run(Cluster(Pool(cost, 1), Pool(cost, 1)), (0.0, 100, 5)).trips[0]
    assert trip.handoff_s == pytest.approx(0.0)


def test_handoffs_of_one_step_share_the_senders_link() -> None:
    cost = LinearCost(0.01, 0.001, 0.0, 0.0, transfer_token_s=0.001)
    outcome = run(Cluster(Pool(cost, 2), Pool(cost, 1)), (0.0, 100, 3), (0.0, 100, 3))
    handoffs = sorted(trip.handoff_s for trip in outcome.trips)
    assert handoffs[0] >= 0.1 - 1e-9
    first, second = sorted(trip.first_token_s + trip.handoff_s for trip in outcome.trips)
    assert second - first >= 0.1 - 1e-9


def test_decodes_share_steps() -> None:
    outcome = run(Cluster(Pool(COST, 1)), (0.0, 10, 50), (0.0, 10, 50))
    assert outcome.workers["decode-0000"].steps < 60


def test_prefill_waits_for_the_decode_workers_step_but_not_in_pairs() -> None:
    slow = LinearCost(base_s=0.2, prefill_token_s=0.0, sequence_s=0.0, context_token_s=0.0)
    for paired, wait_s in ((False, 0.16), (True, 0.0)):
        cluster = Cluster(Pool(slow, 1), Pool(COST, 1), paired=paired)
        second = run(cluster, (0.0, 100, 9), (0.15, 100, 2)).trips[1]  # the first decodes from 0.11 s on, 0.2 s a step
        assert second.ttft_s == pytest.approx(0.11 + wait_s)


def test_a_request_that_never_fits_is_refused_and_the_rest_goes_on() -> None:
    small = LinearCost(0.01, 0.001, 0.0, 0.0, capacity_tokens=160)
    outcome = run(Cluster(Pool(small, 1), Pool(COST, 1)), (0.0, 200, 5), (0.1, 100, 5))
    assert [trip.end for trip in outcome.trips] == [End.REFUSED, End.FINISHED]


def test_a_full_router_refuses() -> None:
    outcome = run(Cluster(Pool(COST, 1), max_inflight=1), (0.0, 100, 50), (0.01, 100, 5))
    assert outcome.trips[1].end is End.REFUSED


def test_requests_wait_for_pages_in_order() -> None:
    small = LinearCost(0.01, 0.001, 0.0, 0.0, capacity_tokens=128)
    outcome = run(Cluster(Pool(small, 1), Pool(COST, 1)), (0.0, 100, 10), (0.01, 100, 10), (0.02, 100, 10))
    firsts = [trip.first_token_s for trip in outcome.trips]
    assert firsts == sorted(firsts)
    assert outcome.trips[1].first_token_s > outcome.trips[0].last_token_s
    assert outcome.workers["decode-0000"].pages_high_water <= 8


def test_a_killed_decode_worker_costs_a_second_prefill_of_what_the_client_has() -> None:
    cluster = Cluster(Pool(COST, 2), Pool(COST, 1))
    calm = run(cluster, (0.0, 100, 100)).trips[0]
    hit = run(cluster, (0.0, 100, 100), changes=(Change(0.5, "decode", "kill", 0),)).trips[0]
    assert (hit.end, hit.attempts) == (End.FINISHED, 2)
    assert hit.first_token_s == calm.first_token_s
    sent_s = 0.5 - calm.first_token_s
    again_s = 0.01 + 0.001 * (100 + 1 + sent_s // 0.01)
    assert hit.last_token_s - calm.last_token_s == pytest.approx(again_s, abs=0.021)


def test_killed_workers_without_substitute_lose_their_requests() -> None:
    outcome = run(Cluster(Pool(COST, 1)), (0.0, 100, 100), changes=(Change(0.5, "decode", "kill", 0),))
    assert outcome.trips[0].end is End.LOST


def test_a_returned_worker_serves_again() -> None:
    changes = (Change(0.5, "decode", "kill", 0), Change(0.6, "decode", "return", 0))
    outcome = run(Cluster(Pool(COST, 1)), (0.0, 10, 5), (1.0, 10, 5), changes=changes)
    assert outcome.count(End.FINISHED) == 2


def test_a_drained_worker_finishes_what_it_has_and_gets_nothing_new() -> None:
    outcome = run(
        Cluster(Pool(COST, 2)), (0.0, 10, 100), (0.0, 10, 100), (0.5, 10, 5), (0.6, 10, 5),
        changes=(Change(0.4, "decode", "shrink"),),
    )  # fmt: skip
    assert outcome.count(End.FINISHED) == 4
    assert outcome.workers["decode-0001"].busy_s == pytest.approx(0.02 + 99 * 0.01, rel=0.05)


def test_a_grown_pool_shares_the_load() -> None:
    requests = [(0.2 + 0.01 * n, 100, 20) for n in range(40)]
    alone = run(Cluster(Pool(COST, 1)), *requests)
    grown = run(Cluster(Pool(COST, 1)), *requests, changes=(Change(0.1, "decode", "grow"),))
    assert grown.percentiles(0.9)[0] < alone.percentiles(0.9)[0]


def test_it_stops_as_soon_as_the_slo_is_decided() -> None:
    arrivals = [Arrival(0.001 * n, 1000, 5) for n in range(100)]
    cluster = Cluster(Pool(COST, 1, EngineLimits(step_tokens=1000)))
    slo = Slo(ttft_s=2.0, tpot_s=10.0)
    stopped, whole = simulate(cluster, arrivals, decide=slo), simulate(cluster, arrivals)
    assert stopped.gave_up
    assert stopped.finished_s < whole.finished_s
    assert whole.attainment(slo).joint < 0.9
    easy = Slo(ttft_s=2 * max(trip.ttft_s for trip in whole.trips), tpot_s=10.0)
    decided = simulate(cluster, arrivals, decide=easy)
    assert not decided.gave_up
    assert decided.attainment(easy).joint == pytest.approx(0.9)
    assert decided.finished_s < whole.finished_s


def test_a_pipeline_keeps_as_many_batches_in_flight_as_it_has_stages() -> None:
    requests = [(0.0, 100, 2)] * 2
    one, two = (run(Cluster(Pool(COST, 1, EngineLimits(step_tokens=100), stages)), *requests) for stages in (1, 2))
    assert max(trip.first_token_s for trip in two.trips) < max(trip.first_token_s for trip in one.trips)


def test_the_same_input_gives_the_same_output() -> None:
    requests = [(0.01 * n, 50 + n, 20) for n in range(30)]
    cluster = Cluster(Pool(COST, 2), Pool(COST, 2))
    assert run(cluster, *requests) == run(cluster, *requests)


def test_linear_cost_of_mixed_steps_pays_the_constant_once() -> None:
    mixed = StepShape(((0, 10),), (100,))
    assert step_s(COST, mixed) == pytest.approx(0.01 + 10 * 0.001)
    assert step_s(COST, StepShape((), ())) == 0.0


def test_workers_cache_prefixes_where_the_workload_knows_them() -> None:
    arrivals = [Arrival(0.0, 100, 5, (1, 2)), Arrival(1.0, 100, 5, (1, 3))]
    for cluster in (Cluster(Pool(COST, 1)), Cluster(Pool(COST, 1), Pool(COST, 1))):
        cold, warm = simulate(cluster, arrivals), simulate(cluster, arrivals, block_tokens=64)
        assert [trip.ttft_s for trip in cold.trips] == pytest.approx([0.11, 0.11])
        assert [trip.ttft_s for trip in warm.trips] == pytest.approx([0.11, 0.11 - 0.064])
        assert sum(use.hit_tokens for use in warm.workers.values()) == 64
        assert sum(use.hit_tokens for use in cold.workers.values()) == 0


def test_prompts_go_where_their_blocks_are_until_the_wait_there_is_too_long() -> None:
    def prompt(at_s: float, *blocks: int) -> Arrival:
        return Arrival(at_s, 64 * len(blocks), 1, blocks)

    limits = EngineLimits(page_tokens=64, step_tokens=1 << 20)
    pools = {"decode": Pool(COST, 1, limits), "prefill": Pool(COST, 3, limits)}
    turns = [prompt(float(turn), *range(8)) for turn in range(9)]

    def hits(strategy: Strategy, arrivals: list[Arrival]) -> list[int]:
        outcome = simulate(Cluster(**pools, strategy=strategy), arrivals, block_tokens=64)
        return [use.hit_tokens for name, use in outcome.workers.items() if name.startswith("prefill")]

    assert sorted(hits("prefix_affinity", turns)) == [0, 0, 8 * 511]
    assert hits("round_robin", turns) == [2 * 511] * 3
    burst = [prompt(0.0, *range(8)), *(prompt(1.0, *range(8), 100 + number) for number in range(300))]
    assert all(hit > 0 for hit in hits("prefix_affinity", burst))
