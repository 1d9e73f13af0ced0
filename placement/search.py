"""Which cluster: every phase alone first, then both together (DistServe, OSDI'24, with this system's own simulator).

    1. Every way to run a replica, prefill and decode, is measured alone: its goodput per replica. Of several batch
       settings at one parallel degree the best stays.
    2. A composition is so many replicas of one way for prefill and of one for decode, or so many that do both. Only
       those are tried to which no replica can be added within the accelerators there are.
    3. Compositions are tried in the order of the goodput that the phases alone promise, each against the best so far.
       First each of its pools alone (:mod:`placement.gates`), which is remembered; then the whole cluster, joint
       attainment, in one simulation; only if that does better is its own goodput sought. Of many accelerators, those
       that promise less than ``1 / SLACK`` of the best are not tried.

The promise is an estimate and no bound (a pool shares its queue better than its parts), therefore the slack; the
exhaustive search is the same without steps 1 and 3 and is what tests compare with.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from placement.composition import (
    EVERY_SPLIT_UP_TO,
    Composition,
    Promise,
    Rates,
    Space,
    Way,
    by_degree,
    cells_within,
    colocated,
    near_splits,
    splits,
)
from placement.gates import Gates, Question, ask
from placement.goodput import (
    ALONE_WITHIN,
    SETTLED_S,
    UNMET,
    Trial,
    decode_alone,
    improve,
    prefill_alone,
    rate_at,
    step_below,
    whole_alone,
)
from placement.outcome import Slo
from placement.workload import Workload

SLACK = 2.0  # how much better than promised a pool may be that shares its queue; a promise is of one replica
LEAST_REQUESTS, MOST_REQUESTS = 2000, 20_000  # of a trial
WAVE = 2  # candidates of a variant tried side by side once there is something to try them against
Mapper = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
Progress = Callable[[str], None]


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

    space: Space
    best: tuple[Scored, ...]
    prefill_alone: tuple[tuple[Way, float], ...]
    decode_alone: tuple[tuple[Way, float], ...]
    whole_alone: tuple[tuple[Way, float], ...]
    tried: int  # compositions simulated as a whole


def search(
    space: Space, gpus: int, trial: Trial, *, mapper: Mapper = map, progress: Progress = lambda _: None
) -> Found:
    """The best composition of every variant on at most ``gpus`` accelerators. ``mapper`` may use several processes."""
    trial = trial.trimmed()
    prefills, decodes, wholes = _phases_alone(space, gpus, trial, mapper, progress)
    gates, tried = Gates(), 0
    variants = (
        colocated(wholes, gpus),  # first: its simulations take longest
        splits(prefills, decodes, gpus),
        near_splits(space, prefills, decodes, gpus),
    )
    slack = SLACK if gpus > EVERY_SPLIT_UP_TO else math.inf
    contests = [_Contest(variant, gates, slack) for variant in variants]
    while wave := [(contest, task) for contest in contests for task in contest.wave()]:
        results = mapper(_Better(trial), [task for _, task in wave])
        for (contest, task), (answers, rate) in zip(wave, results, strict=True):
            tried += all(answers)
            if contest.tried(task, answers, rate):
                composition = task.promise.composition
                progress(f"{rate:.2f} requests/s on {composition.gpus}: {composition.title}")
    best = sorted(
        (contest.best for contest in contests if contest.best), key=lambda s: (-s.goodput, s.composition.gpus)
    )
    return Found(space, tuple(best), tuple(prefills.items()), tuple(decodes.items()), tuple(wholes.items()), tried)


def enough(space: Space, gpus: int, workload: Workload, slo: Slo) -> int:
    """So many requests that a trial of what ``gpus`` accelerators promise lasts :data:`SETTLED_S`."""
    one = Trial(workload, slo, 1000)
    rates = [one.guess(way.pool(1)) / way.gpus for way in space.whole]
    return min(MOST_REQUESTS, max(LEAST_REQUESTS, math.ceil(SETTLED_S * gpus * max(rates))))


def with_help(chosen: Scored, trial: Trial) -> Scored:
    """``chosen`` with decode workers that compute prompts too, where the goodput is higher so."""
    composition = chosen.composition
    if composition.prefill is None:
        return chosen
    helped = replace(composition, local_prefill=True)
    above = step_below(chosen.goodput / composition.cells)
    found = improve(helped.cluster, trial, above=above)
    return replace(chosen, composition=helped, goodput=rate_at(found) * composition.cells) if found > above else chosen


def resplit(found: Found, gpus: int) -> Composition | None:
    """What promises most on ``gpus`` accelerators by the phases alone."""
    promised = [*splits(dict(found.prefill_alone), dict(found.decode_alone), gpus)]
    promised += colocated(dict(found.whole_alone), gpus)
    return max(promised, key=lambda promise: promise.rate).composition if promised else None


def exhaustive(space: Space, gpus: int, trial: Trial) -> Scored | None:
    """Every composition of the space, each with its own goodput; for small instances."""
    best: Scored | None = None
    for composition in _everything(space, gpus):
        goodput = rate_at(improve(composition.cluster, trial, guess=composition.gpus)) * composition.cells
        if goodput and (best is None or goodput > best.goodput):
            best = Scored(composition, goodput, goodput)
    return best


def _phases_alone(
    space: Space, gpus: int, trial: Trial, mapper: Mapper, progress: Progress
) -> tuple[Rates, Rates, Rates]:
    """Goodput per replica of prefill, decode and whole sequences; of every degree the best batch setting."""
    tasks = [
        (kind, ways)
        for kind, pool in (("prefill", space.prefill), ("decode", space.decode), ("whole", space.whole))
        for ways in by_degree(way for way in pool if way.gpus <= gpus)
    ]
    progress(f"{len(tasks)} degrees of parallelism, each alone")
    phases: dict[str, dict[Way, float]] = {"prefill": {}, "decode": {}, "whole": {}}
    for (kind, ways), (index, rate) in zip(tasks, mapper(_Alone(trial), tasks), strict=True):
        if rate > 0:
            way = ways[index]
            phases[kind][way] = rate
            progress(f"{kind} alone: {rate / way.gpus:.2f} requests/s per accelerator with {way}")
    return phases["prefill"], phases["decode"], phases["whole"]


class _Contest:
    """The candidates of one variant, each against the best of it so far."""

    def __init__(self, promises: Iterable[Promise], gates: Gates, slack: float) -> None:
        self.best: Scored | None = None
        self._gates, self._slack = gates, slack
        self._candidates = deque(sorted(promises, key=lambda p: (-p.rate, p.composition.gpus)))

    def wave(self) -> list[_Task]:
        """The next candidates that nothing known rules out, and what to ask of them."""
        wave: list[_Task] = []
        reached, most = (self.best.goodput, WAVE) if self.best else (0.0, 1)
        while self._candidates and len(wave) < most and self._candidates[0].rate * self._slack > reached:
            promise = self._candidates.popleft()
            above = step_below(reached / promise.composition.cells) if reached > 0 else UNMET
            questions = self._gates.open(promise.composition, above + 1) if reached > 0 else ()
            if questions is not None:
                wave.append(_Task(promise, above, questions))
        return wave

    def tried(self, task: _Task, answers: tuple[bool, ...], rate: float) -> bool:
        """Whether ``rate`` makes the task's composition the best."""
        self._gates.learn(task.questions, answers)
        better = rate > (self.best.goodput if self.best else 0.0)
        if better:
            self.best = Scored(task.promise.composition, rate, task.promise.rate)
        return better


@dataclass(frozen=True, slots=True)
class _Task:
    """A candidate, the grid index per cell that it must beat, and what is not known yet of its pools."""

    promise: Promise
    above: int
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class _Alone:
    """The best batch setting of one degree alone (its index) and its goodput: a callable that processes can share."""

    trial: Trial

    def __call__(self, task: tuple[str, tuple[Way, ...]]) -> tuple[int, float]:
        kind, ways = task
        measure = {"prefill": prefill_alone, "decode": decode_alone, "whole": whole_alone}[kind]
        best, best_step = 0, UNMET
        for index, way in enumerate(ways):
            step = measure(way.pool(1), self.trial, above=best_step, within=ALONE_WITHIN)
            if step > best_step:
                best, best_step = index, step
        return best, rate_at(best_step)


@dataclass(frozen=True, slots=True)
class _Better:
    """Tries one candidate: the answers about its pools, and its goodput, 0 where that is not above the best's."""

    trial: Trial

    def __call__(self, task: _Task) -> tuple[tuple[bool, ...], float]:
        answers = ask(task.questions, self.trial)
        if not all(answers):
            return answers, 0.0
        composition, above = task.promise.composition, task.above
        found = improve(composition.cluster, self.trial, above=above, guess=task.promise.rate / composition.cells)
        return answers, rate_at(found) * composition.cells if found > above else 0.0


def _everything(space: Space, gpus: int) -> Iterator[Composition]:
    """All that fits, cells within nodes among it."""
    for p, d in product(space.prefill, space.decode):
        for n in range(1, gpus // p.gpus + 1):
            for m in range(1, (gpus - n * p.gpus) // d.gpus + 1):
                yield Composition(d, m, p, n)
    node_gpus = min(gpus, space.node_gpus)
    for p, d in product(space.near_prefill, space.decode):
        for n in range(1, node_gpus // p.gpus + 1):
            for m in range(1, (node_gpus - n * p.gpus) // d.gpus + 1):
                cells = cells_within(gpus, space.node_gpus, n * p.gpus + m * d.gpus)
                yield Composition(d, m, p, n, "high", cells)
    for way in space.whole:
        for n in range(1, gpus // way.gpus + 1):
            yield Composition(way, n)
