"""Measures how much longer a step takes while another worker computes on the same machine.

Workers that share a machine share memory's bandwidth, caches and, where there are more threads than cores, the cores.
The other worker is a real one: a process of its own with its own copy of the model. The same steps are timed in turns,
while it rests and while it computes, so that drift of the machine's speed falls on both alike.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

from baton.config import PoolConfig
from baton.errors import ConfigError
from engine.build import build_engine, load_model
from engine.model import Model
from placement.cost import StepShape
from placement.measure import DECODE_STEPS, Scenario, Watch, pool_for, run_scenario

TURNS = 7
READY_S = 120.0  # to load the model once more
SCENARIOS = (
    Scenario(512, (), (160,)),
    Scenario(512, (), (300,) * 4),
    Scenario(512, (), (300,) * 12),
    Scenario(512, (160,), ()),
    Scenario(512, (100,), (300,) * 3),
)


@dataclass(frozen=True, slots=True)
class Worker:
    """What a worker is made of; ``max_context``: tokens of its longest sequence."""

    folder: Path
    dtype: str
    threads: int
    pool: PoolConfig
    max_context: int


def measure_beside(model: Model, worker: Worker) -> float:
    """How many times as long a step takes beside one other worker. Raises :class:`ConfigError` where that one fails."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    computing, stop = context.Event(), context.Event()
    other = context.Process(target=_compute, args=(there, computing, stop, worker), daemon=True)
    other.start()
    there.close()
    try:
        if not here.poll(READY_S):
            raise ConfigError(f"the second worker is not ready after {READY_S:.0f} s", field="profile")
        here.recv_bytes()
        return _compare(_Bench(model, worker), computing)
    except EOFError:
        raise ConfigError("the second worker failed to start", field="profile") from None
    finally:
        stop.set()
        computing.set()  # it looks at ``stop`` between two rounds
        other.join(READY_S)
        if other.is_alive():
            other.kill()
        here.close()


class _Bench:
    """One engine and the scenarios that fit it."""

    def __init__(self, model: Model, worker: Worker) -> None:
        pool, max_context = worker.pool, worker.max_context
        longest = max_context - DECODE_STEPS - 2
        self.scenarios = [s for s in SCENARIOS if max((*s.prompts, *s.contexts)) <= longest]
        self._pool = pool_for(pool, SCENARIOS[0].step_tokens, self.scenarios, max_context)
        self._engine = build_engine(model, self._pool, max_context)

    def seconds(self, scenario: Scenario) -> float:
        """Of all its steps together."""
        seen: dict[StepShape, list[float]] = {}
        run_scenario(self._engine, self._pool, scenario, seen, Watch("wall"))
        return sum(map(sum, seen.values()))


def _compare(bench: _Bench, computing: Event) -> float:
    """How much longer the scenarios take."""
    alone, beside = list[list[float]](), list[list[float]]()  # by turn and scenario
    for scenario in bench.scenarios:
        bench.seconds(scenario)  # warm
    for _ in range(TURNS):
        for times, busy in ((alone, False), (beside, True)):
            if busy:
                computing.set()
            else:
                computing.clear()
                bench.seconds(bench.scenarios[0])  # lets the other one end its step
            times.append([bench.seconds(scenario) for scenario in bench.scenarios])
    return slowdown(alone, beside)


def slowdown(alone: Sequence[Sequence[float]], beside: Sequence[Sequence[float]]) -> float:
    """The geometric mean of a turn's ratios, since the machine drifts from turn to turn; of these the median.

    At least 1: what remains below it is noise.
    """
    turns = (
        math.exp(statistics.fmean(math.log(b / a) for a, b in zip(one, other, strict=True)))
        for one, other in zip(alone, beside, strict=True)
    )
    return max(1.0, statistics.median(turns))


def _compute(parent: Connection, computing: Event, stop: Event, worker: Worker) -> None:
    """The other worker: computes while ``computing`` is set, until ``stop`` is or its parent is gone."""
    bench = _Bench(load_model(worker.folder, worker.dtype, worker.threads), worker)
    parent.send_bytes(b"ready")
    while not stop.is_set() and not parent.poll():
        if computing.wait(0.1):
            for scenario in bench.scenarios:
                if computing.is_set():
                    bench.seconds(scenario)
