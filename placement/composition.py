"""What a search chooses from: ways to run a replica, how many of which, and what the phases alone promise of that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from baton.config_admission import AdmissionConfig
from placement.cluster import Cluster, Pool
from placement.cost import CostModel
from placement.replica import EngineLimits

SPLITS = 3  # splits tried per pair of ways where there are too many to try
EVERY_SPLIT_UP_TO = 8  # accelerators: up to here each of them is tried
CELL_SLACK = 1.25  # how much better than promised the few replicas of a cell may be

# Requests of the default class are promised nothing but a deadline, minutes away: no prediction turns them away.
LINE = AdmissionConfig(predict=False)

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

    @property
    def key(self) -> tuple[int, int, EngineLimits]:
        """What tells the ways of one phase apart, wherever their handoffs go."""
        return self.tp, self.pp, self.limits

    def pool(self, replicas: int) -> Pool:
        return Pool(self.cost, replicas, self.limits, stages=self.pp)

    def __str__(self) -> str:
        degree = f"TP{self.tp}" + (f" PP{self.pp}" if self.pp > 1 else "")
        return f"{degree}, {self.limits.step_tokens} tokens x {self.limits.max_running} sequences a step"


@dataclass(frozen=True, slots=True)
class Space:
    """What is searched. ``prefill`` ways hold the cost of a handoff between nodes; ``near_prefill`` within one.

    High affinity: cells of at most ``node_gpus`` accelerators, each a cluster of its own.
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
    local_prefill: bool = False  # decode workers compute prompts where the router finds that sooner

    @property
    def gpus(self) -> int:
        prefill = self.prefills * self.prefill.gpus if self.prefill else 0
        return self.cells * (prefill + self.decodes * self.decode.gpus)

    @property
    def cluster(self) -> Cluster:
        """One cell. Without the router's line: for one class without promises it changes only where requests wait."""
        prefill = self.prefill.pool(self.prefills) if self.prefill else None
        return Cluster(
            decode=self.decode.pool(self.decodes),
            prefill=prefill,
            local_prefill=self.local_prefill,
        )

    @property
    def title(self) -> str:
        if self.prefill is None:
            return f"{self.decodes} co-located ({self.decode})"
        helping = ", computing prompts too" if self.local_prefill else ""
        split = f"{self.prefills} prefill ({self.prefill}) + {self.decodes} decode ({self.decode}{helping})"
        return split if self.affinity == "low" else f"{self.cells} nodes of {split}"


@dataclass(frozen=True, slots=True)
class Promise:
    """A composition and the requests per second that its phases, each alone, would serve: an estimate, no bound."""

    composition: Composition
    rate: float


Rates = Mapping[Way, float]
"""Requests per second of one replica alone."""


def splits(prefills: Rates, decodes: Rates, gpus: int) -> Iterator[Promise]:
    """For every pair of ways the splits of ``gpus`` that promise most; of few accelerators, every split."""
    for prefill, prefill_rate in prefills.items():
        for decode, decode_rate in decodes.items():
            promises = []
            for n in range(1, (gpus - decode.gpus) // prefill.gpus + 1):
                m = (gpus - n * prefill.gpus) // decode.gpus
                rate = min(n * prefill_rate, m * decode_rate)
                promises.append(Promise(Composition(decode, m, prefill, n), rate))
            promises.sort(key=lambda promise: -promise.rate)
            yield from promises if gpus <= EVERY_SPLIT_UP_TO else promises[:SPLITS]


def near_splits(space: Space, prefills: Rates, decodes: Rates, gpus: int) -> Iterator[Promise]:
    """Cells within nodes, of every size that is the largest of which so many fit."""
    near, fitting = {way.key: way for way in space.near_prefill}, 0
    for cell_gpus in range(min(gpus, space.node_gpus), 1, -1):
        cells = cells_within(gpus, space.node_gpus, cell_gpus)
        if cells == fitting:
            continue
        fitting = cells
        for promise in splits(prefills, decodes, cell_gpus):
            yield from _in_cells(promise, near, cells)


def cells_within(gpus: int, node_gpus: int, cell_gpus: int) -> int:
    """How many cells fit ``gpus`` accelerators that come in nodes, the last one perhaps not whole."""
    return gpus // node_gpus * (node_gpus // cell_gpus) + gpus % node_gpus // cell_gpus


def colocated(wholes: Rates, gpus: int) -> Iterator[Promise]:
    for way, rate in wholes.items():
        if gpus >= way.gpus:
            yield Promise(Composition(way, gpus // way.gpus), rate * (gpus // way.gpus))


def cells_for(space: Space, prefills: Rates, decodes: Rates, gpus: int, rate: float) -> Iterator[Promise]:
    """As many cells, each within a node, as may serve ``rate``: from ``CELL_SLACK`` times fewer than promised on."""
    near = {way.key: way for way in space.near_prefill}
    for cell_gpus in range(2, space.node_gpus + 1):
        most = cells_within(gpus, space.node_gpus, cell_gpus)
        for promise in splits(prefills, decodes, cell_gpus):
            if promise.composition.gpus < cell_gpus:
                continue  # came with smaller cells
            wanted = rate / promise.rate
            for cells in range(max(1, math.floor(wanted / CELL_SLACK)), min(most, math.ceil(wanted) + 1) + 1):
                yield from _in_cells(promise, near, cells)


def by_degree(ways: Iterable[Way]) -> list[tuple[Way, ...]]:
    groups: dict[tuple[int, int], tuple[Way, ...]] = {}
    for way in ways:
        groups[way.tp, way.pp] = (*groups.get((way.tp, way.pp), ()), way)
    return list(groups.values())


def _in_cells(promise: Promise, near: Mapping[tuple[int, int, EngineLimits], Way], cells: int) -> Iterator[Promise]:
    """``cells`` times the composition, its handoffs within a node; nothing where no such way is in the space."""
    one = promise.composition
    close = near.get(one.prefill.key) if one.prefill else None
    if close is not None:
        yield Promise(Composition(one.decode, one.decodes, close, one.prefills, "high", cells), promise.rate * cells)
