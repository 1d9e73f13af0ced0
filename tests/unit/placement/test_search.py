"""Goodput and search on instances small enough to try everything."""

from __future__ import annotations

import pytest
import yaml

from baton import config
from placement import goodput, plan
from placement.goodput import UNMET, Trial, climb, rate_at
from placement.linear import LinearCost
from placement.outcome import Slo
from placement.replica import EngineLimits
from placement.search import Composition, Space, Way, exhaustive, fewest, search
from placement.synthetic import ObservedLengths, Poisson, draw

LENGTHS = ObservedLengths(((400, 40), (900, 20), (100, 60)))
LIMITS = EngineLimits(step_tokens=2048, max_running=64)


def way(tp: int, prefill_token_s: float, context_token_s: float, transfer_token_s: float = 0.0) -> Way:
    cost = LinearCost(0.01, prefill_token_s, 1e-4, context_token_s, transfer_token_s, capacity_tokens=1 << 16, gpus=tp)
    return Way(tp, 1, LIMITS, cost)


def trial(slo: Slo, requests: int = 150) -> Trial:
    return Trial(draw("drawn", requests, 1.0, Poisson(), LENGTHS, seed=3), slo, requests)


def space(transfer_token_s: float = 0.0) -> Space:
    ways = (way(1, 2e-4, 2e-6, transfer_token_s), way(2, 0.8e-4, 1.2e-6, transfer_token_s))
    return Space(ways, ways, ways)


@pytest.mark.parametrize("last", [-40, 0, 7, 150])
@pytest.mark.parametrize("guess", [0.3, 1.0, 50.0])
def test_climb_finds_the_last_rate_that_is_met(last: int, guess: float) -> None:
    assert climb(lambda rate: rate <= rate_at(last) * 1.001, guess=guess) == last


def test_climb_turns_down_what_does_not_beat_the_best_in_one_test() -> None:
    tested: list[float] = []

    def meets(rate: float) -> bool:
        tested.append(rate)
        return rate <= rate_at(5) * 1.001

    assert climb(meets, above=5) == 5
    assert len(tested) == 1
    assert climb(meets, above=4) == 5


def test_what_meets_its_slo_at_no_rate_has_no_goodput() -> None:
    assert climb(lambda rate: False) == UNMET
    assert rate_at(UNMET) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "slo"), [(2, Slo(0.25, 0.02)), (3, Slo(0.6, 0.05))])
def test_search_reaches_the_exhaustive_optimum(gpus: int, slo: Slo) -> None:
    tried = trial(slo)
    found, best = search(space(), gpus, tried), exhaustive(space(), gpus, tried)
    assert best is not None
    assert found.best[0].goodput == best.goodput


def test_a_slow_handoff_makes_co_location_win_and_a_free_one_does_not() -> None:
    slo = Slo(0.25, 0.015)
    free, slow = (search(space(transfer), 4, trial(slo)).best[0] for transfer in (0.0, 1e-2))
    assert free.composition.prefill is not None
    assert slow.composition.prefill is None


def test_fewest_meets_the_rate_and_is_not_beaten_by_fewer() -> None:
    tried = trial(Slo(0.4, 0.03))
    found = search(space(), 6, tried)
    rate = found.best[0].goodput / 2
    chosen = fewest(found, 6, rate, tried)
    assert chosen is not None
    assert tried.meets(chosen.composition.cluster, rate)
    fewer = search(space(), chosen.composition.gpus - 1, tried)
    assert all(scored.goodput < rate * 1.05 for scored in fewer.best)
    assert fewest(found, 6, 100 * rate, tried) is None


def test_a_cell_counts_for_the_whole_plan() -> None:
    one = way(1, 1e-4, 1e-6)
    composition = Composition(one, 3, one, 1, "high", cells=4)
    assert composition.gpus == 16
    assert composition.cluster.gpus == 4


def test_a_phase_alone_is_limited_by_its_own_target_only() -> None:
    tried = trial(Slo(0.25, 1e-9))
    assert goodput.prefill_alone(way(1, 2e-4, 1e-6).pool(1), tried) > UNMET
    assert goodput.decode_alone(way(1, 2e-4, 1e-6).pool(1), tried) == UNMET


def test_a_plan_explains_itself_and_is_a_configuration() -> None:
    tried = trial(Slo(0.25, 0.02))
    found = search(space(1e-5), 4, tried)
    made = plan.make(found.best[0], found, tried, {"model": "m", "hardware": "h"})
    text = made.to_yaml()
    parsed = config.parse(yaml.safe_load(text))
    assert parsed.decode.replicas == made.decode.replicas
    assert parsed.decode.max_running == made.decode.max_running
    assert parsed.prefill.replicas == (made.prefill.replicas if made.prefill else 0)
    assert made.gpus <= 4
    for word in ("bottleneck:", "one more:", "at twice the load:", "against"):
        assert word in text
    at_goodput = next(point for point in made.curve if point.rate == made.goodput)
    assert at_goodput.attainment.joint >= 0.9 > made.curve[-1].attainment.joint
