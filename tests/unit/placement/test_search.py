"""Goodput and search on instances small enough to try everything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from baton import config
from baton.errors import ConfigError
from placement import goodput, plan
from placement.composition import Composition, Space, Way, cells_within, near_splits
from placement.cost import StepShape, step_s
from placement.fewest import fewest
from placement.gates import Gates, ask
from placement.goodput import UNMET, Trial, climb, rate_at
from placement.hardware import Hardware
from placement.linear import LinearCost
from placement.model_shape import ModelShape
from placement.outcome import Slo
from placement.replica import EngineLimits
from placement.roofline import STEP_TOKENS, replica
from placement.search import exhaustive, search
from placement.spaces import gpu_space
from placement.synthetic import ObservedLengths, Poisson, draw

LENGTHS = ObservedLengths(((400, 40), (900, 20), (100, 60)))
LIMITS = EngineLimits(step_tokens=2048, max_running=64, mixed_tokens=2048)


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
@pytest.mark.parametrize(
    ("gpus", "slo"), [(2, Slo(0.25, 0.02)), (3, Slo(0.6, 0.05)), (5, Slo(0.25, 0.02)), (6, Slo(0.6, 0.05))]
)
def test_search_reaches_the_exhaustive_optimum(gpus: int, slo: Slo) -> None:
    tried, near = trial(slo), space(1e-6).prefill
    nodes = replace(space(1e-5), near_prefill=near, node_gpus=4)
    found, best = search(nodes, gpus, tried), exhaustive(nodes, gpus, tried)
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
    assert parsed.decode.tensor_parallel == made.decode.tp
    for word in ("bottleneck:", "one more:", "at twice the load:", "against"):
        assert word in text
    fewer = [other for other in made.frontier if other.gpus < made.gpus]
    assert fewer
    assert all(0 < other.goodput < made.goodput for other in fewer)
    at_goodput = next(point for point in made.curve if point.rate == made.goodput)
    assert at_goodput.attainment.joint >= 0.9 > made.curve[-1].attainment.joint


def test_every_degree_without_stages_is_a_configuration_and_stages_are_refused_by_name(tmp_path: Path) -> None:
    tried = trial(Slo(0.6, 0.05), requests=60)
    found = search(Space(*((way(2, 1e-4, 1e-6), way(4, 0.6e-4, 0.8e-6)),) * 3), 8, tried)
    path = tmp_path / "plan.yaml"
    for scored in found.best:
        made = plan.make(scored, found, tried, {"model": "m", "hardware": "h"})
        path.write_text(made.to_yaml())
        loaded = config.load(path)
        assert made.deployable
        assert loaded.decode.tensor_parallel == made.decode.tp
        assert loaded.prefill.tensor_parallel == (made.prefill.tp if made.prefill else 1)
        staged = replace(made, decode=replace(made.decode, pp=2))
        path.write_text(staged.to_yaml())
        assert "NOT DEPLOYABLE" in path.read_text()
        with pytest.raises(ConfigError, match="unknown key") as refused:
            config.load(path)
        assert refused.value.field == "decode.pipeline_parallel"


def test_only_what_workers_can_be_is_searched_unless_asked_for() -> None:
    hardware, shape = Hardware.load("h200-sxm"), ModelShape.load("llama-3.1-8b")
    few = replace(shape, kv_heads=4)
    plain = gpu_space(few, hardware, None, longest=4096, gap_s=0.03)
    assert {(w.tp, w.pp) for w in plain.decode} == {(1, 1), (2, 1), (4, 1)}
    study = gpu_space(few, hardware, None, longest=4096, gap_s=0.03, pipeline=True)
    assert {(w.tp, w.pp) for w in study.decode} == {(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2)}
    for far, near in zip(study.prefill, study.near_prefill, strict=True):
        assert far.key == near.key
        assert near.cost.transfer_s(1000) < far.cost.transfer_s(1000)
        assert step_s(near.cost, StepShape(((0, 100),), ())) == step_s(far.cost, StepShape(((0, 100),), ()))


def test_the_fewest_accelerators_may_lie_within_nodes() -> None:
    slo, far, near = Slo(0.25, 0.015), (way(1, 2e-4, 2e-6, 1e-2),), (way(1, 2e-4, 2e-6, 0.0),)
    tried, nodes = trial(slo), Space(far, far, (), near, node_gpus=2)
    found = search(nodes, 4, tried)
    assert [scored.composition.affinity for scored in found.best] == ["high"]
    rate = 0.9 * found.best[0].goodput
    chosen = fewest(found, 4, rate, tried)
    assert chosen is not None
    assert chosen.composition.affinity == "high"
    assert tried.meets(chosen.composition.cluster, rate / chosen.composition.cells)
    half = fewest(found, 4, rate / 2.2, tried)
    assert half is not None
    assert half.composition.gpus == 2


def test_what_a_pool_missed_rules_out_smaller_pools_and_higher_rates() -> None:
    gates, one = Gates(), way(1, 2e-4, 2e-6)
    (prefill, decode) = gates.open(Composition(one, 3, one, 2), 50) or ()
    assert (prefill.role, prefill.replicas, decode.role, decode.replicas) == ("prefill", 2, "decode", 3)
    gates.learn((prefill, decode), (True, False))
    assert gates.open(Composition(one, 3, one, 2), 51) is None
    assert gates.open(Composition(one, 2, one, 9), 50) is None
    assert gates.open(Composition(one, 3, one, 2), 49) == (replace(decode, step=decode.step - 1),)
    (again,) = gates.open(Composition(one, 4, one, 3), 50) or ()
    assert again == replace(decode, replicas=4)
    assert gates.open(Composition(one, 4), 99) == ()


def test_pools_are_asked_until_one_says_no() -> None:
    tried, one = trial(Slo(0.25, 1e-9)), way(1, 2e-4, 2e-6)
    questions = Gates().open(Composition(one, 1, one, 1), 0) or ()
    assert ask(questions, tried) == (True, False)
    assert ask(tuple(reversed(questions)), tried) == (False,)


def test_a_plan_says_what_was_not_measured() -> None:
    far = EngineLimits(step_tokens=2 * STEP_TOKENS, max_running=64, mixed_tokens=2 * STEP_TOKENS)
    cost = replica(replace(ModelShape.load("llama-3.1-8b"), layers=2), Hardware.load("h200-sxm"))
    tried = Trial(draw("drawn", 40, 1.0, Poisson(), ObservedLengths(((2 * STEP_TOKENS, 3),)), seed=3), Slo(9, 9), 40)
    found = search(Space((), (), (Way(1, 1, far, cost),)), 1, tried)
    made = plan.make(found.best[0], found, tried, {"model": "m", "hardware": "h"})
    assert "more tokens in a step than tabulated" in made.extrapolated
    assert any(line.startswith("beyond what was measured:") for line in made.story())


def test_cells_lie_within_nodes() -> None:
    assert cells_within(6, 4, 3) == 1
    assert cells_within(6, 4, 2) == 3
    one, close = way(1, 1e-4, 1e-6), way(1, 1e-4, 1e-6, 1e-6)
    nodes = Space((one,), (one,), (), (close,), node_gpus=4)
    sizes = {(p.composition.cells, p.composition.gpus) for p in near_splits(nodes, {one: 2.0}, {one: 3.0}, 6)}
    assert sizes == {(1, 4), (3, 6)}
