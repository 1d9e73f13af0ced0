"""Goodput: the highest request rate at which the wanted share of requests meets TTFT and TPOT, each request both.

Rates lie on a geometric grid, so that two goodputs are equal or differ by at least one step of ``RATE_STEP``; whether
a rate is met is one simulation, which ends early when it is not. The search for the last rate that is met assumes that
a cluster that fails at one rate fails at every higher one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from placement.cluster import Cluster, Pool
from placement.outcome import Outcome, Slo
from placement.replica import EngineLimits
from placement.simulator import simulate
from placement.workload import Workload

RATE_STEP = 1.02
UNMET = -(10**6)  # the grid index of a cluster that meets its SLO at no rate
LOWEST_RATE = 1e-3
HIGHEST_RATE = 1e6
SETTLED_S = 30.0  # simulated seconds that a trial should last: several answers' time
SHORTEST_S = 5.0  # a burst of fewer seconds says nothing of a rate that is to be kept
ALONE_S, ALONE_LEAST = 10.0, 500  # phases alone only rank: so many simulated seconds and requests are enough
ALONE_WITHIN = 4  # and so many grid steps


@dataclass(frozen=True, slots=True)
class Instant:
    """A cost model that costs nothing, in place of the phase that is not looked at."""

    gpus: int = 0

    def sum_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_sum: int) -> float:
        return 0.0

    def decode_step_s(self, batch: int, context_sum: int) -> float:
        return 0.0

    def transfer_s(self, tokens: int) -> float:
        return 0.0

    def exposed_transfer_s(self, tokens: int) -> float:
        return 0.0

    def kv_tokens(self) -> int:
        return 1 << 26


_UNLIMITED = EngineLimits(page_tokens=1 << 10, step_tokens=1 << 30, max_running=1 << 20, max_waiting=1 << 20)
INSTANT = Pool(Instant(), 1, _UNLIMITED)


@dataclass(frozen=True, slots=True)
class Trial:
    """What every candidate of one search is tried with: the first ``requests`` of a workload, at any rate."""

    workload: Workload
    slo: Slo
    requests: int

    def trimmed(self) -> Trial:
        """The same trial without the requests that it does not use: less to hand to other processes."""
        return replace(self, workload=self.workload.lasting(self.requests))

    def run(self, cluster: Cluster, rate: float, *, decide: bool = False) -> Outcome:
        arrivals = self.workload.lasting(self.requests).at_rate(rate).arrivals
        block_tokens = self.workload.block_tokens
        return simulate(cluster, arrivals, block_tokens=block_tokens, decide=self.slo if decide else None)

    def meets(self, cluster: Cluster, rate: float) -> bool:
        """Whether the SLO is attained; no where the trial has too few requests to show it."""
        if self.requests / rate < SHORTEST_S:
            return False
        outcome = self.run(cluster, rate, decide=True)
        return not outcome.gave_up and outcome.attainment(self.slo).joint >= self.slo.attainment - 1e-12

    def of_prefill(self) -> Trial:
        """Only the first token counts, so that there need be no other."""
        first = tuple(replace(a, output_tokens=1) for a in self.workload.lasting(self.requests).arrivals)
        workload = replace(self.workload, arrivals=first)
        return replace(self, workload=workload, slo=replace(self.slo, tpot_s=math.inf))

    def guess(self, pool: Pool, prefill_share: float = 0.7, decode_share: float = 0.8) -> float:
        """The rate at which mean requests fill these shares of the pool's time, decoding at the TPOT: a beginning."""
        arrivals = self.workload.first(self.requests).arrivals[:200]
        prompt = sum(a.prompt_tokens for a in arrivals) // len(arrivals)
        output = sum(a.output_tokens for a in arrivals) / len(arrivals)
        spent_s = 0.0
        if prefill_share:
            spent_s += pool.cost.sum_s(((0, prompt),), 0, 0) / prefill_share
        if decode_share:
            batch, context = 1, prompt + int(output / 2)
            most = max(1, min(pool.limits.max_running, pool.cost.kv_tokens() // pool.stages // max(1, context)))
            step_s = pool.cost.decode_step_s(1, context)
            while 2 * batch <= most and (longer_s := _decode_s(pool, 2 * batch, context)) <= self.slo.tpot_s:
                batch, step_s = 2 * batch, longer_s
            spent_s += output * step_s / batch / decode_share
        return pool.replicas * pool.stages / max(spent_s, 1e-6)

    def shortened(self, guess: float) -> Trial:
        """With as few requests as rank phases alone at about ``guess`` requests per second."""
        return replace(self, requests=min(self.requests, max(ALONE_LEAST, math.ceil(ALONE_S * guess))))


def rate_at(step: int) -> float:
    """Requests per second of a grid index; 0 for :data:`UNMET`."""
    return 0.0 if step <= UNMET else RATE_STEP**step


def step_below(rate: float) -> int:
    """The highest grid index whose rate is at most ``rate``."""
    return math.floor(math.log(rate) / math.log(RATE_STEP) + 1e-9)


def climb(meets: Callable[[float], bool], *, above: int = UNMET, guess: float = 1.0, within: int = 1) -> int:
    """The highest grid index that is met, if it lies above ``above``; else ``above``.

    One test suffices to turn down a candidate that does not beat the best one so far. ``within`` grid steps of it
    are close enough where the answer only ranks.
    """
    low, stride = above, 8
    probe = above + 1 if above > UNMET else step_below(guess)
    while meets(rate_at(probe)):
        low, probe = probe, probe + stride
        stride *= 2
        if rate_at(probe) > HIGHEST_RATE:
            return low
    high = probe
    if low == above:
        if above > UNMET:
            return above
        low, high = _descend(meets, probe)
    while low > UNMET and high - low > within:
        middle = (low + high) // 2
        low, high = (middle, high) if meets(rate_at(middle)) else (low, middle)
    return low


def improve(cluster: Cluster, trial: Trial, *, above: int = UNMET, guess: float = 1.0) -> int:
    """The grid index of the cluster's goodput if it lies above ``above``, else ``above``."""
    return climb(partial(trial.meets, cluster), above=above, guess=guess)


def _descend(meets: Callable[[float], bool], failed: int) -> tuple[int, int]:
    """An index that is met below one that is not, and the lowest that is known not to be."""
    stride = 8
    while rate_at(failed - stride) >= LOWEST_RATE:
        if meets(rate_at(failed - stride)):
            return failed - stride, failed
        failed -= stride
        stride *= 2
    return UNMET, failed


def prefill_alone(pool: Pool, trial: Trial, *, above: int = UNMET, within: int = 1) -> int:
    """Goodput of prefill workers whose KV vanishes as soon as it is there."""
    guess = trial.guess(pool, 0.6, 0)
    cluster, only = Cluster(decode=INSTANT, prefill=pool), trial.shortened(guess).of_prefill()
    return climb(partial(only.meets, cluster), above=above, guess=guess, within=within)


def decode_alone(pool: Pool, trial: Trial, *, above: int = UNMET, within: int = 1) -> int:
    """Goodput of decode workers to which prompts come prefilled at once; the wait for their pages is TTFT."""
    guess = trial.guess(pool, 0, 0.8)
    cluster, only = Cluster(decode=pool, prefill=INSTANT), trial.shortened(guess)
    return climb(partial(only.meets, cluster), above=above, guess=guess, within=within)


def whole_alone(pool: Pool, trial: Trial, *, above: int = UNMET, within: int = 1) -> int:
    """Goodput of workers that compute whole sequences."""
    guess = trial.guess(pool)
    return climb(partial(trial.shortened(guess).meets, Cluster(decode=pool)), above=above, guess=guess, within=within)


def _decode_s(pool: Pool, batch: int, context: int) -> float:
    return pool.cost.decode_step_s(batch, batch * context)
