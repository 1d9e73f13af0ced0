"""Which cluster: every phase alone first, then both together (DistServe, OSDI'24, with this system's own simulator).

    1. Every way to run a replica, prefill and decode, is measured alone: its goodput per replica. Of several batch
       settings at one parallel degree the best stays.
    2. A composition is so many replicas of one way for prefill and of one for decode, or so many that do both. Only
       those are tried to which no replica can be added within the accelerators there are.
    3. Compositions are tried in the order of the goodput that the phases alone promise, each against the best so far:
       one simulation of the whole cluster, joint attainment, says whether it does better at all; only then is its own
       goodput sought. Those that promise less than ``1 / SLACK`` of the best are not tried.

The promise is an estimate and no bound (a pool shares its queue better than its parts), therefore the slack; the
exhaustive search is the same without steps 1 and 3 and is what tests compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from placement.cost import CostModel
from placement.goodput import UNMET, Trial, climb, decode_alone, prefill_alone, rate_at, step_below, whole_alone
from placement.replica import EngineLimits
from placement.simulator import Cluster, Pool

SLACK = 1.5
ALONE_WITHIN = 4  # grid steps: promises only rank
SPLITS = 3  # splits tried per pair of ways in a search that is not exhaustive
Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
Progress = Callable[[str], None]
Affinity = Literal["low", "high"]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run a replica."""

    tp: int
    pp: int
    limits: EngineLimits
    cost: CostModel

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    def pool(self, replicas: int) -> Pool:
        return Pool(self.cost, replicas, self.limits, stages=self.pp)

    def __str__(self) -> str:
        degree = f"TP{self.tp}" + (f" PP{self.pp}" if self.pp > 1 else "")
        return f"{degree}, {self.limits.step_tokens} tokens x {self.limits.max_running} sequences a step"


@dataclass(frozen=True, slots=True)
class Space:
    """What is searched. ``prefill`` ways hold the cost of a handoff between nodes; ``near_prefill`` within one.

    High affinity: ``cells`` of at most ``node_gpus`` accelerators, each a cluster of its own.
    """

    prefill: tuple[Way, ...]
    decode: tuple[Way, ...]
    whole: tuple[Way, ...]
    near_prefill: tuple[Way, ...] = ()
    node_gpus: int = 8


@dataclass(frozen=True, slots=True)
class Composition:
    """``cells`` times so many replicas of ``prefill`` and of ``decode``; co-located without ``prefill``."""

    decode: Way
    decodes: int
    prefill: Way | None = None
    prefills: int = 0
    affinity: Affinity = "low"
    cells: int = 1

    @property
    def gpus(self) -> int:
        prefill = self.prefills * self.prefill.gpus if self.prefill else 0
        return self.cells * (prefill + self.decodes * self.decode.gpus)

    @property
    def cluster(self) -> Cluster:
        """One cell."""
        prefill = self.prefill.pool(self.prefills) if self.prefill else None
        return Cluster(decode=self.decode.pool(self.decodes), prefill=prefill)

    @property
    def title(self) -> str:
        if self.prefill is None:
            return f"{self.decodes} co-located ({self.decode})"
        split = f"{self.prefills} prefill ({self.prefill}) + {self.decodes} decode ({self.decode})"
        return split if self.affinity == "low" else f"{self.cells} nodes of {split}"


@dataclass(frozen=True, slots=True)
class Scored:
    """``goodput`` in requests per second of all cells together."""

    composition: Composition
    goodput: float
    promised: float

    @property
    def per_gpu(self) -> float:
        return self.goodput / self.composition.gpus


@dataclass(frozen=True, slots=True)
class Found:
    """The best of each variant, best first, and what the phases do alone (requests per second per replica)."""

    best: tuple[Scored, ...]
    prefill_alone: tuple[tuple[Way, float], ...]
    decode_alone: tuple[tuple[Way, float], ...]
    whole_alone: tuple[tuple[Way, float], ...]
    tried: int


def search(
    space: Space, gpus: int, trial: Trial, *, mapper: Mapper = map, progress: Progress = lambda _: None
) -> Found:
    """The best composition of every variant on at most ``gpus`` accelerators. ``mapper`` may use several processes."""
    near = {(way.tp, way.pp, way.limits): way for way in space.near_prefill}
    tasks = [
        (kind, ways)
        for kind, pool in (("prefill", space.prefill), ("decode", space.decode), ("whole", space.whole))
        for ways in _by_degree(way for way in pool if way.gpus <= gpus)
    ]
    progress(f"{len(tasks)} degrees of parallelism, each alone")
    phases: dict[str, dict[Way, float]] = {"prefill": {}, "decode": {}, "whole": {}}
    for (kind, _), (way, rate) in zip(tasks, mapper(_Alone(trial), tasks), strict=True):
        if rate > 0:
            phases[kind][way] = rate
            progress(f"{kind} alone: {rate / way.gpus:.2f} requests/s per accelerator with {way}")
    prefills, decodes, wholes = phases["prefill"], phases["decode"], phases["whole"]
    far = list(_splits(prefills, decodes, gpus))
    close = list(_near_splits(prefills, decodes, near, gpus, space.node_gpus)) if near else []
    variants = [far, close, [_colocated(way, rate, gpus) for way, rate in wholes.items()]]
    best, tried = [], 0
    for variant in variants:
        scored, count = _try(variant, trial, mapper, progress)
        tried += count
        best += [scored] if scored else []
    best.sort(key=lambda s: (-s.goodput, s.composition.gpus))
    return Found(tuple(best), tuple(prefills.items()), tuple(decodes.items()), tuple(wholes.items()), tried)


def fewest(
    found: Found, gpus: int, rate: float, trial: Trial, *, mapper: Mapper = map, progress: Progress = lambda _: None
) -> Scored | None:
    """The fewest accelerators, at most ``gpus``, that meet the SLO at ``rate``; None when none do.

    ``found``'s phases alone say roughly how many replicas that takes; compositions around that are tried from the
    smallest on, each in one simulation.
    """
    nearby = [c for c in _nearby(found, rate) if c[0].gpus <= gpus]
    queue = sorted(nearby, key=lambda c: (c[0].gpus, -c[1]))
    while queue:
        wave, queue = queue[:2], queue[2:]
        for (composition, promised), met in zip(wave, mapper(_Meets(trial, rate), wave), strict=True):
            if met:
                progress(f"{composition.gpus} accelerators meet {rate:g} requests/s: {composition.title}")
                return Scored(composition, rate, promised)
    return None


def resplit(found: Found, gpus: int) -> Composition | None:
    """What promises most on ``gpus`` accelerators by the phases alone."""
    promised = [*_splits(dict(found.prefill_alone), dict(found.decode_alone), gpus)]
    promised += [_colocated(way, rate, gpus) for way, rate in found.whole_alone if way.gpus <= gpus]
    return max(promised, key=lambda p: p[1])[0] if promised else None


def exhaustive(space: Space, gpus: int, trial: Trial) -> Scored | None:
    """Every composition of the space, each with its own goodput; for small instances."""
    pairs = (
        Composition(d, m, p, n)
        for p in space.prefill
        for d in space.decode
        for n in range(1, gpus // p.gpus + 1)
        for m in range(1, (gpus - n * p.gpus) // d.gpus + 1)
    )
    wholes = (Composition(w, n) for w in space.whole for n in range(1, gpus // w.gpus + 1))
    best: Scored | None = None
    for composition in (*pairs, *wholes):
        goodput = rate_at(climb(partial(trial.meets, composition.cluster), guess=composition.gpus))
        if goodput and (best is None or goodput > best.goodput):
            best = Scored(composition, goodput, goodput)
    return best


def improve(composition: Composition, trial: Trial, *, above: int = UNMET, guess: float = 1.0) -> int:
    """The grid index of the composition's goodput per cell if it lies above ``above``, else ``above``."""
    return climb(partial(trial.meets, composition.cluster), above=above, guess=guess)


@dataclass(frozen=True, slots=True)
class _Alone:
    """The best batch setting of one degree alone, and its goodput: a callable that processes can share."""

    trial: Trial

    def __call__(self, task: tuple[str, tuple[Way, ...]]) -> tuple[Way, float]:
        kind, ways = task
        measure = {"prefill": prefill_alone, "decode": decode_alone, "whole": whole_alone}[kind]
        best, best_step = ways[0], UNMET
        for way in ways:
            step = measure(way.pool(1), self.trial, above=best_step, within=ALONE_WITHIN)
            if step > best_step:
                best, best_step = way, step
        return best, rate_at(best_step)


@dataclass(frozen=True, slots=True)
class _Better:
    """Tries one composition against the best so far."""

    trial: Trial

    def __call__(self, task: tuple[Composition, float, float]) -> float:
        composition, promised, best = task
        cells = composition.cells
        above = step_below(best / cells) if best > 0 else UNMET
        found = improve(composition, self.trial, above=above, guess=promised / cells)
        return rate_at(found) * cells if found > above else 0.0


@dataclass(frozen=True, slots=True)
class _Meets:
    """Whether one composition meets the SLO at one rate."""

    trial: Trial
    rate: float

    def __call__(self, task: tuple[Composition, float]) -> bool:
        composition, _ = task
        return self.trial.meets(composition.cluster, self.rate / composition.cells)


def _nearby(found: Found, rate: float) -> Iterator[tuple[Composition, float]]:
    """Compositions of about as many replicas as the phases alone ask for."""
    for prefill, prefill_rate in found.prefill_alone:
        for decode, decode_rate in found.decode_alone:
            for n in _around(rate / prefill_rate):
                for m in _around(rate / decode_rate):
                    yield Composition(decode, m, prefill, n), min(n * prefill_rate, m * decode_rate)
    for way, whole_rate in found.whole_alone:
        for n in _around(rate / whole_rate):
            yield Composition(way, n), n * whole_rate


def _around(replicas: float) -> range:
    return range(max(1, math.floor(replicas / SLACK)), math.ceil(replicas) + 3)


def _try(
    promises: Sequence[tuple[Composition, float]], trial: Trial, mapper: Mapper, progress: Progress
) -> tuple[Scored | None, int]:
    """The best of one variant, in waves of two: what a wave is tried against is known before it starts."""
    best, tried = None, 0
    queue = sorted((p for p in promises if p[1] > 0), key=lambda p: (-p[1], p[0].gpus))
    while queue:
        wave, queue = queue[:2], queue[2:]
        reached = best.goodput if best else 0.0
        wave = [(composition, promised) for composition, promised in wave if promised * SLACK > reached]
        if not wave:
            break
        tried += len(wave)
        rates = mapper(_Better(trial), [(composition, promised, reached) for composition, promised in wave])
        for (composition, promised), rate in zip(wave, rates, strict=True):
            if rate > (best.goodput if best else 0.0):
                best = Scored(composition, rate, promised)
                progress(f"{rate:.2f} requests/s on {composition.gpus}: {composition.title}")
    return best, tried


def _by_degree(ways: Iterable[Way]) -> list[tuple[Way, ...]]:
    groups: dict[tuple[int, int], tuple[Way, ...]] = {}
    for way in ways:
        groups[way.tp, way.pp] = (*groups.get((way.tp, way.pp), ()), way)
    return list(groups.values())


def _splits(
    prefills: dict[Way, float], decodes: dict[Way, float], gpus: int, most: int | None = SPLITS
) -> Iterator[tuple[Composition, float]]:
    """For every pair of ways the splits of ``gpus`` that promise most."""
    for prefill, prefill_rate in prefills.items():
        for decode, decode_rate in decodes.items():
            ways = []
            for n in range(1, (gpus - decode.gpus) // prefill.gpus + 1):
                m = (gpus - n * prefill.gpus) // decode.gpus
                ways.append((Composition(decode, m, prefill, n), min(n * prefill_rate, m * decode_rate)))
            ways.sort(key=lambda way: -way[1])
            yield from ways if gpus <= 8 else ways[:most]


def _near_splits(
    prefills: dict[Way, float],
    decodes: dict[Way, float],
    near: dict[tuple[int, int, EngineLimits], Way],
    gpus: int,
    node_gpus: int,
) -> Iterator[tuple[Composition, float]]:
    """Every node a cell of its own."""
    cell_gpus = min(gpus, node_gpus)
    cells = gpus // cell_gpus
    for composition, promised in _splits(prefills, decodes, cell_gpus):
        way = composition.prefill
        close = near.get((way.tp, way.pp, way.limits)) if way else None
        if close is not None:
            cell = Composition(composition.decode, composition.decodes, close, composition.prefills, "high", cells)
            yield cell, promised * cells


def _colocated(way: Way, rate: float, gpus: int) -> tuple[Composition, float]:
    replicas = gpus // way.gpus
    return Composition(way, replicas), rate * replicas
