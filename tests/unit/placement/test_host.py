"""Workers that share a machine slow each other down while both compute, and only then."""

from __future__ import annotations

import pytest

from placement.cluster import Cluster, Pool
from placement.host import Host, SharedMachine
from placement.linear import LinearCost
from placement.measure_beside import slowdown
from placement.outcome import Outcome
from placement.replica import EngineLimits
from placement.simulator import simulate
from placement.workload import Arrival

COST = LinearCost(base_s=0.01, prefill_token_s=0.001, sequence_s=0.0, context_token_s=0.0)


def ends(outcome: Outcome) -> list[float]:
    return [trip.last_token_s for trip in outcome.trips]


def test_both_take_longer_while_both_compute_and_the_rest_alone() -> None:
    cluster = Cluster(Pool(COST, 2, EngineLimits(step_tokens=1000)), machine=SharedMachine(cores=4 / 3))
    # Each prompt is one step of 0.11 s and 0.21 s alone. The shorter ends at 1.5 times its own; by then the longer has
    # done as much, and does the rest alone.
    outcome = simulate(cluster, [Arrival(0.0, 100, 1), Arrival(0.0, 200, 1)])
    assert ends(outcome) == pytest.approx([0.165, 0.165 + 0.1])


def test_one_that_begins_during_anothers_step_stretches_its_rest() -> None:
    cluster = Cluster(Pool(COST, 2, EngineLimits(step_tokens=1000)), machine=SharedMachine(cores=1.0))
    outcome = simulate(cluster, [Arrival(0.0, 200, 1), Arrival(0.1, 1, 1)])
    small_s = 2.0 * 0.011
    assert ends(outcome) == pytest.approx([0.21 + small_s / 2, 0.1 + small_s])


def test_machines_of_their_own_feel_nothing() -> None:
    arrivals = [Arrival(0.0, 100, 30), Arrival(0.0, 200, 30)]
    alone = [simulate(Cluster(Pool(COST, 1)), [arrival]) for arrival in arrivals]
    both = simulate(Cluster(Pool(COST, 2)), arrivals)
    assert ends(both) == pytest.approx([ends(one)[0] for one in alone])


class Tenant:
    def __init__(self) -> None:
        self.ratios: list[float] = []

    def retime(self, ratio: float) -> None:
        self.ratios.append(ratio)


def test_what_more_want_than_there_is_takes_as_many_times_longer() -> None:
    host, some = Host(SharedMachine(cores=2.0, pair=1.1)), [Tenant() for _ in range(3)]
    factors = []
    for tenant in some:
        host.computes(tenant, 0.1, prompts=0, tokens=1)
        factors.append(host.factor)
    assert factors == pytest.approx([1.0, 1.1, 1.5 * 1.1])
    assert some[0].ratios == pytest.approx([1.1, 1.5])
    assert some[2].ratios == []
    for tenant in some:
        host.rests(tenant)
    assert host.factor == 1.0


def test_a_step_of_more_tokens_leaves_others_less() -> None:
    host, one, other = Host(SharedMachine(cores=2.0, request_s=0.05, token_s=0.01)), Tenant(), Tenant()
    host.computes(one, 0.1, prompts=0, tokens=1)
    assert host.factor == 1.0  # one core, and a tenth of the other
    host.computes(other, 0.1, prompts=1, tokens=4)
    assert host.factor == pytest.approx((1.1 + 1.9) / 2)
    assert one.ratios == pytest.approx([1.5])
    host.computes(one, 0.1, prompts=0, tokens=1)  # as before: nobody feels it
    assert other.ratios == []


def test_a_step_feels_that_the_machine_becomes_slower_under_way() -> None:
    machine = SharedMachine(cores=2.0, course=((0.0, 1.0), (0.1, 2.0), (0.5, 0.5)))
    outcome = simulate(Cluster(Pool(COST, 1, EngineLimits(step_tokens=1000)), machine=machine), [
        Arrival(0.0, 200, 1),  # 0.21 s alone: 0.1 of them at once, the rest twice as slowly
        Arrival(0.4, 200, 1),  # 0.05 of them by 0.5 s, the rest twice as fast
    ])  # fmt: skip
    assert ends(outcome) == pytest.approx([0.1 + 0.22, 0.5 + 0.08])


def test_a_machine_without_cores_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        SharedMachine(cores=0.0)
    with pytest.raises(ValueError, match="timeline"):
        Host(SharedMachine(cores=1.0, course=((0.0, 1.0),)))


def test_what_was_measured_as_faster_beside_another_is_noise() -> None:
    assert slowdown([[1.0, 2.0]], [[0.9, 1.9]]) == 1.0
    assert slowdown([[1.0, 1.0]], [[2.0, 0.5 * 2.0]]) == pytest.approx(2.0**0.5)
    drifts = slowdown([[1.0], [2.0], [4.0]], [[1.1], [2.2], [9.0]])  # of one turn something else was in the way
    assert drifts == pytest.approx(1.1)
