"""The fewest accelerators for a rate: how many replicas of every way that takes alone, then clusters around that."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

from placement.composition import Composition, Promise, Way, cells_for
from placement.gates import MARGIN_STEPS, Question, Role
from placement.goodput import Trial, step_below
from placement.search import SLACK, WAVE, Found, Progress, Scored
from placement.stories import SERIAL

SPARE = 2  # replicas of one pool beyond the least number


def fewest(
    found: Found,
    gpus: int,
    rate: float,
    trial: Trial,
    *,
    executor: Executor = SERIAL,
    progress: Progress = lambda _: None,
) -> Scored | None:
    """The fewest accelerators, at most ``gpus``, that meet the SLO at ``rate``; None when none do.

    For every way the least number of replicas that meets the rate alone is found by bisection; clusters from there on
    are tried from the smallest on, each in one simulation, those of high affinity among them.
    """
    trial = trial.trimmed()
    queue = sorted(_nearby(found, gpus, rate, trial, executor), key=lambda p: (p.composition.gpus, -p.rate))
    while queue:
        wave, queue = queue[:WAVE], queue[WAVE:]
        for promise, met in zip(wave, executor.map(_Meets(trial, rate), [p.composition for p in wave]), strict=True):
            if met:
                composition = promise.composition
                progress(f"{composition.gpus} accelerators meet {rate:g} requests/s: {composition.title}")
                return Scored(composition, rate, promise.rate)
    return None


@dataclass(frozen=True, slots=True)
class _Meets:
    """Whether one composition meets the SLO at one rate."""

    trial: Trial
    rate: float

    def __call__(self, composition: Composition) -> bool:
        return self.trial.meets(composition.cluster, self.rate / composition.cells)


@dataclass(frozen=True, slots=True)
class _Least:
    """The least number of replicas of one way that alone meet a rate, between what their own rate promises."""

    trial: Trial
    rate: float

    def __call__(self, task: tuple[str, Way, float]) -> int:
        kind, way, alone = task
        low, high = math.floor(self.rate / alone / SLACK), math.ceil(self.rate / alone) + 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._met(kind, way, middle) else (middle, high)
        return high

    def _met(self, kind: str, way: Way, replicas: int) -> bool:
        if kind == "whole":
            return self.trial.meets(Composition(way, replicas).cluster, self.rate)
        role: Role = "prefill" if kind == "prefill" else "decode"
        return Question(role, way, replicas, step_below(self.rate) - MARGIN_STEPS).met(self.trial)


def _nearby(found: Found, gpus: int, rate: float, trial: Trial, executor: Executor) -> Iterator[Promise]:
    """Compositions of the least replicas that meet the rate alone, and some more; at most ``gpus`` accelerators."""
    prefills, decodes, wholes = dict(found.prefill_alone), dict(found.decode_alone), dict(found.whole_alone)
    kinds = (("prefill", prefills), ("decode", decodes), ("whole", wholes))
    tasks = [(kind, way, alone) for kind, rates in kinds for way, alone in rates.items()]
    least = {(kind, way): n for (kind, way, _), n in zip(tasks, executor.map(_Least(trial, rate), tasks), strict=True)}
    spare = range(SPARE + 1)
    far = (
        Promise(
            Composition(d, least["decode", d] + j, p, least["prefill", p] + i),
            min((least["prefill", p] + i) * prefills[p], (least["decode", d] + j) * decodes[d]),
        )
        for p in prefills for d in decodes for i in spare for j in spare
    )  # fmt: skip
    near = cells_for(found.space, prefills, decodes, gpus, rate)
    both = (Promise(Composition(w, least["whole", w] + i), rate) for w in wholes for i in spare)
    yield from (promise for promise in (*far, *near, *both) if promise.composition.gpus <= gpus)
