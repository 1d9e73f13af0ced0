"""What comes to a cluster: when, how long the prompts, how long the answers. Everything here is a list of arrivals.

A workload is read from a trace (:mod:`placement.traces`) or drawn (:mod:`placement.synthetic`), then scaled: to a rate
by compressing time, which keeps the burstiness, or in length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from baton.errors import ConfigError

SHARES = (0.5, 0.9, 0.95, 0.99)
END_BITS = 32  # no prompt is that long


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. ``blocks``: hashes of its prompt's leading blocks, where the trace knows them."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def page_keys(arrival: Arrival, block_tokens: int, page_tokens: int) -> tuple[int, ...]:
    """What names the full pages of ``arrival``'s prompt in a prefix cache, from its blocks' hashes.

    A block's hash stands for all tokens up to the block's end (or the prompt's), so together with a page's end it names
    every page that ends in the block. Pages past the last hash have no name.
    """
    ends = range(page_tokens, min(arrival.prompt_tokens, len(arrival.blocks) * block_tokens) + 1, page_tokens)
    return tuple(arrival.blocks[(end - 1) // block_tokens] << END_BITS | end for end in ends)


@dataclass(frozen=True, slots=True)
class Workload:
    """Arrivals sorted by time, the first at 0 s. ``block_tokens``: tokens per block hash, 0 when there are none."""

    name: str
    arrivals: tuple[Arrival, ...]
    block_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.arrivals:
            raise ConfigError("holds no requests", field=f"workload {self.name}")

    @property
    def span_s(self) -> float:
        return self.arrivals[-1].at_s - self.arrivals[0].at_s

    @property
    def rate(self) -> float:
        """Requests per second; a workload without extent in time has none."""
        return (len(self.arrivals) - 1) / self.span_s if self.span_s > 0 else 0.0

    def at_rate(self, rate: float) -> Workload:
        """The same requests in the same order at ``rate`` per second: time is compressed, burstiness stays."""
        if not rate > 0 or self.span_s <= 0:
            raise ConfigError(f"cannot be scaled to {rate} requests per second", field=f"workload {self.name}")
        return self.in_time(self.rate / rate)

    def in_time(self, factor: float) -> Workload:
        """Every time multiplied by ``factor``."""
        return replace(self, arrivals=tuple(replace(a, at_s=a.at_s * factor) for a in self.arrivals))

    def in_length(self, prompt: float, output: float) -> Workload:
        """Every length multiplied, at least one token each. Block hashes no longer fit and are dropped."""
        scaled = (
            Arrival(a.at_s, max(1, round(a.prompt_tokens * prompt)), max(1, round(a.output_tokens * output)))
            for a in self.arrivals
        )
        return Workload(self.name, tuple(scaled))

    def fitting(self, context_tokens: int) -> Workload:
        """Only requests whose prompt and output fit ``context_tokens``."""
        kept = [a for a in self.arrivals if a.prompt_tokens + a.output_tokens <= context_tokens]
        return self.of(kept)

    def first(self, requests: int) -> Workload:
        return replace(self, arrivals=self.arrivals[:requests])

    def lasting(self, requests: int) -> Workload:
        """The first ``requests``, the whole repeated as often as that takes, each time with prefixes of its own."""
        if requests <= len(self.arrivals):
            return self.first(requests)
        period_s = self.span_s * len(self.arrivals) / max(1, len(self.arrivals) - 1)
        rounds = -(-requests // len(self.arrivals))
        hashes = 1 + max((block for a in self.arrivals for block in a.blocks), default=0)
        repeated = (
            replace(a, at_s=a.at_s + n * period_s, blocks=tuple(block + n * hashes for block in a.blocks))
            for n in range(rounds)
            for a in self.arrivals
        )
        return replace(self, arrivals=tuple(repeated)[:requests])

    def of(self, arrivals: Sequence[Arrival]) -> Workload:
        """``arrivals`` under this name, moved so that the first comes at 0 s."""
        if not arrivals:
            raise ConfigError("no request is left", field=f"workload {self.name}")
        first_s = arrivals[0].at_s
        return replace(self, arrivals=tuple(replace(a, at_s=a.at_s - first_s) for a in arrivals))


@dataclass(frozen=True, slots=True)
class Lengths:
    mean: float
    percentiles: tuple[float, ...]  # at SHARES
    longest: int


@dataclass(frozen=True, slots=True)
class Description:
    """A workload in numbers. ``gap_cv``: standard deviation over mean of the gaps, 1 for a Poisson process.

    ``minute_peak``: the busiest minute's rate over the mean rate. ``prefix_share``: blocks that an unbounded prefix
    cache shared by everyone would have held already, over all blocks; None without block hashes.
    """

    name: str
    requests: int
    span_s: float
    rate: float
    gap_cv: float
    minute_peak: float
    prompt: Lengths
    output: Lengths
    length_correlation: float
    prefix_share: float | None


def describe(workload: Workload) -> Description:
    times = np.array([a.at_s for a in workload.arrivals])
    prompts = np.array([a.prompt_tokens for a in workload.arrivals])
    outputs = np.array([a.output_tokens for a in workload.arrivals])
    gaps = np.diff(times)
    per_minute = np.bincount(((times - times[0]) // 60).astype(int))
    varied = len(times) > 1 and prompts.std() > 0 and outputs.std() > 0
    return Description(
        name=workload.name,
        requests=len(times),
        span_s=workload.span_s,
        rate=workload.rate,
        gap_cv=float(gaps.std() / gaps.mean()) if len(gaps) and gaps.mean() > 0 else math.nan,
        minute_peak=float(per_minute.max() / 60 / workload.rate) if workload.span_s >= 60 else math.nan,
        prompt=_lengths(prompts),
        output=_lengths(outputs),
        length_correlation=float(np.corrcoef(prompts, outputs)[0, 1]) if varied else 0.0,
        prefix_share=prefix_share(workload),
    )


def prefix_share(workload: Workload) -> float | None:
    """Share of prompt blocks that came before, in order: what no prefix cache can beat (None without hashes).

    A statistic of the trace alone: a worker's cache is bounded, and requests of one prefix reach different workers.
    """
    if not workload.block_tokens:
        return None
    seen: set[int] = set()
    hits = total = 0
    for arrival in workload.arrivals:
        total += len(arrival.blocks)
        hits += sum(block in seen for block in arrival.blocks)
        seen.update(arrival.blocks)
    return hits / total if total else None


def _lengths(values: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Lengths:
    shares = tuple(float(np.quantile(values, share)) for share in SHARES)
    return Lengths(float(values.mean()), shares, int(values.max()))
