"""Why a plan is what it is, by counterfactuals: what binds is what, given more of, would raise the goodput most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from placement.composition import Composition
from placement.cost import CostModel
from placement.goodput import Trial, improve, rate_at, step_below
from placement.search import Found, Scored, resplit

FRONTIER = (0.25, 0.5, 0.75, 1.25)  # numbers of accelerators over the plan's
FRONTIER_REQUESTS = 1500


@dataclass(frozen=True, slots=True)
class FreeHandoff:
    """``cost`` with handoffs that take no time: what the links cost is the difference."""

    cost: CostModel

    @property
    def gpus(self) -> int:
        return self.cost.gpus

    def sum_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_sum: int) -> float:
        return self.cost.sum_s(chunks, batch, context_sum)

    def decode_step_s(self, batch: int, context_sum: int) -> float:
        return self.cost.decode_step_s(batch, context_sum)

    def transfer_s(self, tokens: int) -> float:
        return 0.0

    def exposed_transfer_s(self, tokens: int) -> float:
        return 0.0

    def kv_tokens(self) -> int:
        return self.cost.kv_tokens()


def more(chosen: Scored, found: Found, trial: Trial, executor: Executor) -> tuple[str, str]:
    """What binds, and what one more accelerator or replica buys."""
    now, cells = chosen.composition, chosen.composition.cells
    changes = {"decode": replace(now, decodes=now.decodes + 1)}
    if now.prefill is not None:
        free = replace(now.prefill, cost=FreeHandoff(now.prefill.cost))
        changes["prefill"] = replace(now, prefills=now.prefills + 1)
        changes["handoff"] = replace(now, prefill=free)
        changes["both"] = replace(now, prefills=now.prefills + 1, decodes=now.decodes + 1)
    fresh = resplit(found, now.gpus + 1) if cells == 1 else None
    if fresh is not None and fresh.gpus <= now.gpus + 1:
        changes["resplit"] = fresh
    above = step_below(chosen.goodput / cells)
    rates = dict(zip(changes, executor.map(_Improve(trial, above), changes.values()), strict=True))
    gains = {name: max(0.0, rate / chosen.goodput - 1) for name, rate in rates.items()}
    return _binding(now, gains), _purchase(now, chosen, gains, changes)


def _binding(now: Composition, gains: Mapping[str, float]) -> str:
    resources = {name: gain for name, gain in gains.items() if name not in ("resplit", "both")}
    name = max(resources, key=lambda key: resources[key])
    if resources[name] <= 0:
        if gains.get("both", 0.0) > 0:
            more = f"one more replica of each would raise the goodput by {gains['both']:.1%}"
            return f"prefill and decode alike, neither alone: {more}"
        return "none alone: no single pool or link raises the goodput by a step of 2 %"
    what = {
        "decode": "decode" if now.prefill else "the co-located pool",
        "prefill": "prefill",
        "handoff": "the handoff",
    }
    more = "handoffs that take no time" if name == "handoff" else "one more replica"
    return f"{what[name]}: {more} would raise the goodput by {resources[name]:.1%}"


def _purchase(now: Composition, chosen: Scored, gains: Mapping[str, float], changes: Mapping[str, Composition]) -> str:
    offers = []
    for name in ("prefill", "decode"):
        if name in changes:
            gpus = changes[name].gpus - now.gpus
            offers.append(f"a {name} replica ({gpus} GPU) +{gains[name] * chosen.goodput:.2f} requests/s")
    if "both" in changes:
        gpus = changes["both"].gpus - now.gpus
        offers.append(f"one of each ({gpus} GPU) +{gains['both'] * chosen.goodput:.2f}")
    fresh = gains.get("resplit", 0.0)
    if fresh > 0:
        offers.append(f"one GPU with the pools split anew ({changes['resplit'].title}) +{fresh * chosen.goodput:.2f}")
    elif all(changes[name].gpus - now.gpus > 1 for name in ("prefill", "decode") if name in changes):
        offers.append("a single GPU buys nothing at these degrees")
    return "; ".join(offers)


def frontier(found: Found, gpus: int, trial: Trial, executor: Executor) -> tuple[tuple[Composition, float], ...]:
    """What fewer accelerators, and some more, would serve: the split that promises most at each number."""
    steps = {round(share * gpus) for share in FRONTIER}
    splits = [split for count in sorted(steps) if count != gpus and (split := resplit(found, count)) is not None]
    least = min(trial.requests, FRONTIER_REQUESTS)
    tasks = [(split, max(least, trial.requests * split.gpus // gpus)) for split in splits]
    return tuple(zip(splits, executor.map(_Goodput(trial), tasks), strict=True))


@dataclass(frozen=True, slots=True)
class _Goodput:
    """The goodput of a composition, by a trial of so many requests."""

    trial: Trial

    def __call__(self, task: tuple[Composition, int]) -> float:
        composition, requests = task
        trial = replace(self.trial, requests=requests)
        return rate_at(improve(composition.cluster, trial, guess=trial.guess(composition.cluster.decode)))


@dataclass(frozen=True, slots=True)
class _Improve:
    trial: Trial
    above: int

    def __call__(self, composition: Composition) -> float:
        return rate_at(improve(composition.cluster, self.trial, above=self.above)) * composition.cells
