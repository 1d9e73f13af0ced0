"""Workers that share a machine slow each other down while both compute, and only then."""

from __future__ import annotations

import pytest

from placement.cluster import Cluster, Pool
from placement.host import Host
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
    cluster = Cluster(Pool(COST, 2, EngineLimits(step_tokens=1000)), slowdown=(1.0, 1.5))
    # Each prompt is one step of 0.11 s and 0.21 s alone. The shorter ends at 1.5 times its own; by then the longer has
    # done as much, and does the rest alone.
    outcome = simulate(cluster, [Arrival(0.0, 100, 1), Arrival(0.0, 200, 1)])
    assert ends(outcome) == pytest.approx([0.165, 0.165 + 0.1])


def test_one_that_begins_during_anothers_step_stretches_its_rest() -> None:
    cluster = Cluster(Pool(COST, 2, EngineLimits(step_tokens=1000)), slowdown=(1.0, 2.0))
    outcome = simulate(cluster, [Arrival(0.0, 200, 1), Arrival(0.1, 1, 1)])
    small_s = 2.0 * 0.011
    assert ends(outcome) == pytest.approx([0.21 + small_s / 2, 0.1 + small_s])


def test_machines_of_their_own_feel_nothing() -> None:
    arrivals = [Arrival(0.0, 100, 30), Arrival(0.0, 200, 30)]
    alone = [simulate(Cluster(Pool(COST, 1)), [arrival]) for arrival in arrivals]
    both = simulate(Cluster(Pool(COST, 2)), arrivals)
    assert ends(both) == pytest.approx([ends(one)[0] for one in alone])


def test_the_last_factor_holds_for_more_workers() -> None:
    class Idle:
        def retime(self, ratio: float) -> None: ...

    host = Host((1.0, 1.5))
    for _ in range(3):
        host.began(Idle())
    assert host.factor == 1.5


def test_factors_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        Host((1.0, 0.0))


def test_what_was_measured_as_faster_beside_another_is_noise() -> None:
    assert slowdown([1.0, 2.0], [0.9, 1.9]) == 1.0
    assert slowdown([1.0, 1.0], [2.0, 0.5 * 2.0]) == pytest.approx(2.0**0.5)
