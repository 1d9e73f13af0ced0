"""One machine under several workers: what computes at the same time slows each other down.

Workers in a step want a core for each of their threads. Beside its steps every request and every token costs processor
time too: the router's, the event loops', encoding and landing. That comes first, since the engine's threads give way
(``engine.threads``), so that a step of many tokens slows everybody down more than one of few. With more wanted than
there is, each step takes as many times longer:

    factor = max(1, sum over those in a step of (threads + chores / step) / cores)

and ``pair`` times more while two or more compute, who share caches and memory's bandwidth as well. A machine that has
neighbours of its own is not always as fast, either (:mod:`placement.pulse`). Whenever the factor changes, the rest of
every step under way is stretched or shortened.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

from placement.events import Rank, Timeline


@dataclass(frozen=True, slots=True)
class SharedMachine:
    """``cores``: what is left for the workers and their requests. ``request_s``, ``token_s``: CPU seconds that a prompt
    and an output token cost beside their steps. ``course``: from when on everything takes how many times as long."""

    cores: float
    threads: int = 1  # of each worker
    pair: float = 1.0
    request_s: float = 0.0
    token_s: float = 0.0
    course: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if not (self.cores > 0 and self.pair > 0):
            raise ValueError(f"cores and pair must be positive, are {self.cores} and {self.pair}")


class Tenant(Protocol):
    def retime(self, ratio: float) -> None:
        """From now on the step under way takes ``ratio`` times the time it would have."""


class Host:
    """Without ``machine`` every worker has one of its own, and nobody feels another."""

    def __init__(self, machine: SharedMachine | None = None, timeline: Timeline | None = None) -> None:
        """``timeline``: where a machine has a course, which it then follows."""
        if machine is not None and machine.course and timeline is None:
            raise ValueError("a course needs a timeline")
        self.machine = machine
        self.factor = 1.0  # what a step takes now, in what it takes alone
        self._wanted: dict[Tenant, float] = {}  # cores, by who is in a step
        self._longer = 1.0  # than usually: the machine's course
        if machine is not None and timeline is not None:
            for at_s, longer in machine.course:
                timeline.at(at_s, Rank.CHANGE, partial(self._follow, machine, longer))

    def computes(self, tenant: Tenant, step_s: float, *, prompts: int, tokens: int) -> None:
        """``tenant`` begins a step that takes ``step_s`` alone, ends so many prompts and gives so many tokens."""
        machine = self.machine
        if machine is None:
            return
        chores_s = prompts * machine.request_s + tokens * machine.token_s
        wanted = machine.threads + (chores_s / step_s if step_s > 0 else 0.0)
        if self._wanted.get(tenant) != wanted:
            self._wanted[tenant] = wanted
            self._stretch(machine, tenant)

    def rests(self, tenant: Tenant) -> None:
        """``tenant`` has nothing to compute, or is gone."""
        if self.machine is not None and self._wanted.pop(tenant, None) is not None:
            self._stretch(self.machine, tenant)

    def _follow(self, machine: SharedMachine, longer: float) -> None:
        self._longer = longer
        self._stretch(machine, None)

    def _stretch(self, machine: SharedMachine, cause: Tenant | None) -> None:
        before = self.factor
        self.factor = self._longer * max(1.0, sum(self._wanted.values()) / machine.cores)
        if len(self._wanted) > 1:
            self.factor *= machine.pair
        ratio = self.factor / before
        if ratio != 1.0:
            for tenant in self._wanted:
                if tenant is not cause:
                    tenant.retime(ratio)
