"""Workloads that are drawn: an arrival process and a joint distribution of lengths, from one seed.

Lengths are drawn as pairs, so that long prompts keep their short answers: from a trace's own pairs (bootstrap), or
from a bivariate log-normal fitted to them, which also reaches lengths between the observed ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from baton.errors import ConfigError
from placement.workload import Arrival, Workload, describe

Rng = np.random.Generator
Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


class Process(Protocol):
    def gaps_s(self, count: int, rate: float, rng: Rng) -> Floats:
        """``count`` gaps between arrivals whose long-run rate is ``rate`` per second."""
        ...


@dataclass(frozen=True, slots=True)
class Poisson:
    def gaps_s(self, count: int, rate: float, rng: Rng) -> Floats:
        return rng.exponential(1 / rate, count)


@dataclass(frozen=True, slots=True)
class Gamma:
    """Independent gaps of coefficient of variation ``cv``: above 1 they clump, below 1 they are regular."""

    cv: float

    def gaps_s(self, count: int, rate: float, rng: Rng) -> Floats:
        shape = 1 / self.cv**2
        return rng.gamma(shape, 1 / (rate * shape), count)


@dataclass(frozen=True, slots=True)
class Bursts:
    """A Markov-modulated Poisson process of two states: bursts of ``ratio`` times the calm rate.

    Stays are exponential with means ``burst_s`` and ``calm_s``. The calm rate follows from the long-run rate.
    """

    ratio: float
    burst_s: float
    calm_s: float

    def gaps_s(self, count: int, rate: float, rng: Rng) -> Floats:
        share = self.burst_s / (self.burst_s + self.calm_s)
        calm_rate = rate / (share * self.ratio + 1 - share)
        gaps: list[float] = []
        bursting, gap_s = bool(rng.random() < share), 0.0
        left_s = rng.exponential(self.burst_s if bursting else self.calm_s)
        while len(gaps) < count:
            wait_s = rng.exponential(1 / (calm_rate * (self.ratio if bursting else 1)))
            if wait_s < left_s:
                left_s -= wait_s
                gaps.append(gap_s + wait_s)
                gap_s = 0.0
            else:  # no arrival before the state changes; the exponential forgets, so a new wait is drawn
                gap_s += left_s
                bursting = not bursting
                left_s = rng.exponential(self.burst_s if bursting else self.calm_s)
        return np.array(gaps)


class LengthModel(Protocol):
    def draw(self, count: int, rng: Rng) -> Sequence[tuple[int, int]]:
        """``count`` pairs of prompt and output tokens, each at least 1."""
        ...


@dataclass(frozen=True, slots=True)
class ObservedLengths:
    """The pairs of a trace, drawn with replacement."""

    pairs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, workload: Workload) -> ObservedLengths:
        return cls(tuple((a.prompt_tokens, a.output_tokens) for a in workload.arrivals))

    def draw(self, count: int, rng: Rng) -> Sequence[tuple[int, int]]:
        return [self.pairs[index] for index in rng.integers(len(self.pairs), size=count)]


@dataclass(frozen=True, slots=True)
class LogNormalLengths:
    """Logarithms of both lengths are jointly normal; what is drawn is clipped at ``longest``."""

    means: tuple[float, float]
    deviations: tuple[float, float]
    correlation: float
    longest: tuple[int, int]

    @classmethod
    def fit(cls, workload: Workload) -> LogNormalLengths:
        """By the moments of the logarithms, which are the maximum-likelihood estimates."""
        logs = np.log([(a.prompt_tokens, a.output_tokens) for a in workload.arrivals])
        deviations = logs.std(axis=0)
        correlation = float(np.corrcoef(logs.T)[0, 1]) if deviations.min() > 0 else 0.0
        means = logs.mean(axis=0)
        longest = np.exp(logs.max(axis=0)).round()
        return cls(
            (float(means[0]), float(means[1])),
            (float(deviations[0]), float(deviations[1])),
            correlation,
            (int(longest[0]), int(longest[1])),
        )

    def draw(self, count: int, rng: Rng) -> Sequence[tuple[int, int]]:
        first, second = rng.standard_normal((2, count))
        second = self.correlation * first + math.sqrt(1 - self.correlation**2) * second
        columns = []
        for normal, mean, deviation, longest in zip(
            (first, second), self.means, self.deviations, self.longest, strict=True
        ):
            columns.append(np.clip(np.exp(mean + deviation * normal).round(), 1, longest).astype(int).tolist())
        return list(zip(*columns, strict=True))


def draw(name: str, requests: int, rate: float, process: Process, lengths: LengthModel, *, seed: int) -> Workload:
    """``requests`` arrivals; the same seed gives the same workload, and the same lengths at every rate."""
    if requests < 1 or not rate > 0:
        raise ConfigError(f"{requests} requests at {rate} per second cannot be drawn", field="workload")
    pairs = lengths.draw(requests, np.random.default_rng((seed, 1)))
    times = np.cumsum(process.gaps_s(requests, rate, np.random.default_rng((seed, 2))))
    arrivals = [Arrival(float(t), prompt, output) for t, (prompt, output) in zip(times, pairs, strict=True)]
    return Workload(name, tuple(arrivals)).of(arrivals)


def like(workload: Workload, requests: int, *, rate: float | None = None, seed: int = 0) -> Workload:
    """A drawn workload with the trace's rate (or ``rate``), gap variation and length pairs."""
    cv = describe(workload).gap_cv
    process: Process = Gamma(cv) if cv > 0 and abs(cv - 1) > 0.05 else Poisson()
    return draw(
        f"{workload.name}-like", requests, rate or workload.rate, process, ObservedLengths.of(workload), seed=seed
    )
