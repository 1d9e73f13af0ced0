"""The engine's steps as a formula, fitted to measured ones. Pure.

The engine's step has the terms of :mod:`placement.roofline`; here their sizes are fitted to measured steps instead of
summed from kernels. With N rows (chunk tokens and decodes), K chunks, B decodes, C = sum(contexts), and chunks of
``count`` tokens after ``start``:

    T = t_0 + f(N) + t_K K + t_B B + t_C C + a sum(count^2)/2 + b sum(count start) + c sum(start + count | start > 0)

f is piecewise linear and rising: projections, MLP and head, bound by the weights' bytes at few rows and by arithmetic
at many. a is causal attention inside a chunk, b attention over what came before it, c the gathering of a chunk's
earlier KV. All coefficients are non-negative, so T rises in each argument; they minimise relative errors, robustly,
because a step that something else interrupted must not bend the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from placement.cost import StepShape
from placement.grids import Floats, HeldOut

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_SWEEPS = 20000
_SETTLED = 1e-9
_ROBUST = 0.1  # relative residuals above this count by their size, not by its square (Huber, 1964)
_REWEIGHTED = 5
LEAST_STEPS = 40  # fewer do not determine the coefficients


@dataclass(frozen=True, slots=True)
class Observation:
    """One step's shape and the median of its ``repeats``; ``spread`` is the interquartile range over that median."""

    step: StepShape
    seconds: float
    spread: float
    repeats: int


@dataclass(frozen=True, slots=True)
class StepFit:
    """Coefficients of the formula above; ``slopes[i]`` is f's from ``KNOTS[i]`` (from 0 for the first) to the next."""

    base_s: float
    chunk_s: float
    decode_s: float
    context_s: float
    inside_s: float
    before_s: float
    gather_s: float
    slopes: tuple[float, ...]

    @classmethod
    def of(cls, steps: Sequence[Observation]) -> StepFit:
        seconds = np.array([o.seconds for o in steps])
        features = np.array([_features(o.step) for o in steps]) / seconds[:, None]
        weights = np.ones_like(seconds)
        for _ in range(_REWEIGHTED):
            values = non_negative(features * weights[:, None], weights)
            weights = np.sqrt(_ROBUST / np.maximum(_ROBUST, np.abs(features @ values - 1)))
        base, chunk, decode, context, inside, before, gather, *slopes = values.tolist()
        return cls(base, chunk, decode, context, inside, before, gather, tuple(slopes))

    def times(self, longer: float) -> StepFit:
        """Of a machine on which everything takes ``longer`` times as long."""
        values = {name: longer * value for name, value in asdict(self).items() if name != "slopes"}
        return StepFit(**values, slopes=tuple(longer * slope for slope in self.slopes))

    def seconds(self, step: StepShape) -> float:
        values = (
            self.base_s, self.chunk_s, self.decode_s, self.context_s, self.inside_s, self.before_s, self.gather_s,
            *self.slopes,
        )  # fmt: skip
        return math.fsum(a * b for a, b in zip(values, _features(step), strict=True))

    def rows_s(self, rows: int) -> float:
        """f of the formula."""
        return math.fsum(a * b for a, b in zip(self.slopes, _hinges(rows), strict=True))


@lru_cache(maxsize=8)
def fitted(steps: tuple[Observation, ...]) -> StepFit:
    """As :meth:`StepFit.of`, which takes seconds, once for every profile."""
    return StepFit.of(steps)


def _features(step: StepShape) -> list[float]:
    rows = len(step.contexts) + sum(count for _, count in step.chunks)
    inside = sum(count * count for _, count in step.chunks) / 2
    before = sum(start * count for start, count in step.chunks)
    gathered = sum(start + count for start, count in step.chunks if start)
    head = [1.0, len(step.chunks), len(step.contexts), sum(step.contexts), inside, before, gathered]
    return [*map(float, head), *_hinges(rows)]


def _hinges(rows: int) -> list[float]:
    """How much of each segment between knots ``rows`` covers."""
    edges = (0, *KNOTS[1:])
    return [
        float(min(rows, above) - below if rows > below else 0)
        for below, above in zip(edges, (*edges[1:], rows + 1), strict=True)
    ]


def non_negative(features: Floats, target: Floats) -> Floats:
    """argmin |features x - target|, x >= 0, by coordinate descent on scaled columns; exact at convergence."""
    scale = np.linalg.norm(features, axis=0)
    used = scale > 0
    columns = features[:, used] / scale[used]
    gram, right = columns.T @ columns, columns.T @ target
    x = np.zeros(columns.shape[1])
    for _ in range(_SWEEPS):
        moved = 0.0
        for i in range(x.size):
            new = max(0.0, x[i] + float(right[i] - gram[i] @ x))
            moved, x[i] = max(moved, abs(new - x[i])), new
        if moved < _SETTLED:
            break
    solution = np.zeros(features.shape[1])
    solution[used] = x / scale[used]
    return solution


def held_out(steps: Sequence[Observation], folds: int = 5, seed: int = 0) -> HeldOut:
    """Every step predicted by a fit of the other folds alone."""
    fold = np.random.default_rng(seed).integers(0, folds, len(steps))
    predicted = np.empty(len(steps))
    for one in range(folds):
        fit = StepFit.of([step for step, f in zip(steps, fold, strict=True) if f != one])
        for at in np.flatnonzero(fold == one).tolist():
            predicted[at] = fit.seconds(steps[at].step)
    return HeldOut.of(predicted, np.array([step.seconds for step in steps]))


def rows(step: StepShape) -> int:
    """Tokens that the step computes."""
    return len(step.contexts) + sum(count for _, count in step.chunks)
