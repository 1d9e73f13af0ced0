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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import product

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
from placement.stories import SERIAL, Story, together
from placement.workload import Workload

SLACK = 2.0  # how much better than promised a pool may be that shares its queue; a promise is of one replica
LEAST_REQUESTS, MOST_REQUESTS = 2000, 20_000  # of a trial
WAVE = 2  # candidates of a variant tried side by side once there is something to try them against
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
    space: Space, gpus: int, trial: Trial, *, executor: Executor = SERIAL, progress: Progress = lambda _: None
) -> Found:
    """The best composition of every variant on at most ``gpus`` accelerators.

    ``executor`` may have several processes, which all variants share: one waits for its own results only.
    """
    trial = trial.trimmed()
    slack = SLACK if gpus > EVERY_SPLIT_UP_TO else math.inf
    wholes, prefills, decodes = (  # whole sequences first: their simulations take longest
        _Phase(kind, [way for way in ways if way.gpus <= gpus], trial, executor, progress)
        for kind, ways in (("whole", space.whole), ("prefill", space.prefill), ("decode", space.decode))
    )
    contests = [_Contest(trial, slack, executor, progress) for _ in range(3)]
    whole, far, near = contests
    together(
        [
            whole.run([wholes], lambda: colocated(wholes.rates(), gpus)),
            far.run([prefills, decodes], lambda: splits(prefills.rates(), decodes.rates(), gpus)),
            near.run([prefills, decodes], lambda: near_splits(space, prefills.rates(), decodes.rates(), gpus)),
        ]
    )
    best = sorted(
        (contest.best for contest in contests if contest.best), key=lambda s: (-s.goodput, s.composition.gpus)
    )
    return Found(
        space,
        tuple(best),
        prefill_alone=prefills.alone,
        decode_alone=decodes.alone,
        whole_alone=wholes.alone,
        tried=sum(contest.tried for contest in contests),
    )


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


class _Phase:
    """One kind of worker alone: of every degree the best batch setting, and its goodput per replica."""

    def __init__(self, kind: str, ways: Sequence[Way], trial: Trial, executor: Executor, progress: Progress) -> None:
        self._kind, self._degrees, self._progress = kind, by_degree(ways), progress
        self.asked = [executor.submit(_Alone(trial), kind, degree) for degree in self._degrees]
        self._rates: dict[Way, float] = {}

    @property
    def alone(self) -> tuple[tuple[Way, float], ...]:
        return tuple(self.rates().items())

    def rates(self) -> Rates:
        """Of what meets the SLO at any rate. Once all that was ``asked`` is there."""
        if not self._rates:
            for degree, future in zip(self._degrees, self.asked, strict=True):
                index, rate = future.result()
                if rate > 0:
                    way = degree[index]
                    self._rates[way] = rate
                    self._progress(f"{self._kind} alone: {rate / way.gpus:.2f} requests/s per accelerator with {way}")
        return self._rates


class _Contest:
    """The candidates of one variant, each against the best of it so far."""

    def __init__(self, trial: Trial, slack: float, executor: Executor, progress: Progress) -> None:
        self.best: Scored | None = None
        self.tried = 0  # candidates that were simulated as a whole
        self._gates, self._slack = Gates(), slack
        self._work, self._executor, self._progress = _Better(trial), executor, progress
        self._candidates = deque[Promise]()

    def run(self, needs: Sequence[_Phase], promises: Callable[[], Iterable[Promise]]) -> Story:
        """Tries the candidates, which are known as soon as the phases that they consist of are."""
        yield [future for phase in needs for future in phase.asked]
        self._candidates += sorted(promises(), key=lambda p: (-p.rate, p.composition.gpus))
        while wave := self._wave():
            asked = [self._executor.submit(self._work, task) for task in wave]
            yield asked
            for task, future in zip(wave, asked, strict=True):
                self._learn(task, *future.result())

    def _wave(self) -> list[_Task]:
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

    def _learn(self, task: _Task, answers: tuple[bool, ...], rate: float) -> None:
        """What became of one candidate, at the rate 0 where it is not above the best's."""
        self._gates.learn(task.questions, answers)
        self.tried += all(answers)
        if rate > (self.best.goodput if self.best else 0.0):
            composition = task.promise.composition
            self.best = Scored(composition, rate, task.promise.rate)
            self._progress(f"{rate:.2f} requests/s on {composition.gpus}: {composition.title}")


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

    def __call__(self, kind: str, ways: tuple[Way, ...]) -> tuple[int, float]:
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
