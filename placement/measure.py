"""Measures the engine's steps: real weights, the real engine, chosen shapes.

Contexts of decodes need no prefill: their pages are reserved and the sequence is started as if its KV had landed, which
is how a decode worker gets it. A twin of the engine's scheduler is driven by the same calls, so the shape of each step
is what was really computed. Scenarios run in a shuffled order, in rounds: drift of the machine's speed then falls on
all shapes alike, and a run that is interrupted has seen all kinds.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from baton.config import PoolConfig
from baton.request import Sampling, TokenEvent, Work
from engine.build import build_engine
from engine.engine import Engine
from engine.model import Model
from engine.pages import PagePool
from engine.scheduler import Scheduler
from engine.sequence import Job, Slice
from placement.cost import StepShape
from placement.step_fit import Observation

ROUNDS = 3
DECODE_STEPS = 4  # of one batch: the first is dropped (cold pages), the median of the others is one measurement
CHUNKS = (512, 256, 128, 64, 16)
PROMPTS = (1, 2, 4, 8, 12, 24, 32, 48, 96, 160, 200, 300, 400)
PACKED = ((2, 200), (4, 100), (8, 50), (16, 25))  # prompts per step, tokens each
BATCHES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CONTEXTS = (24, 160, 600, 1800)
MIXED = (  # decodes, their contexts, prompt tokens
    (3, 120, 80), (2, 900, 100), (4, 300, 250), (8, 600, 400), (16, 300, 200), (32, 160, 350), (48, 300, 60),
    (1, 160, 16), (3, 160, 16), (6, 160, 16), (1, 160, 32), (3, 400, 32), (6, 160, 32), (4, 300, 48),  # engine.pace's
)  # fmt: skip
RAGGED = (4, 8, 16, 32)  # decodes whose contexts spread from RAGGED_SPAN[0] to RAGGED_SPAN[1]
RAGGED_SPAN = (32, 1000)

Progress = Callable[[str, float], None]
Clock = Literal["wall", "cpu"]


@dataclass(frozen=True, slots=True)
class Scenario:
    """Prompts to prefill under a budget of ``step_tokens``, beside decodes of these contexts; then ``steps`` steps."""

    step_tokens: int
    prompts: tuple[int, ...]
    contexts: tuple[int, ...]


def scenarios(*, max_context: int, kv_tokens: int, page_tokens: int, max_running: int) -> list[Scenario]:
    """The grid, without what does not fit the engine."""
    longest = max_context - DECODE_STEPS - 2
    most = max(CHUNKS)
    prefills = [Scenario(chunk, (min(longest, chunk * 4 if chunk < most else longest),), ()) for chunk in CHUNKS]
    prefills += [Scenario(most, (prompt,), ()) for prompt in PROMPTS]
    prefills += [Scenario(most, (tokens,) * count, ()) for count, tokens in PACKED]
    decodes = [Scenario(most, (), (context,) * batch) for batch in BATCHES for context in CONTEXTS]
    decodes += [Scenario(most, (), _spread(batch)) for batch in RAGGED]
    mixed = [Scenario(most, (prompt,), (context,) * batch) for batch, context, prompt in MIXED]
    room = kv_tokens - 64 * (DECODE_STEPS + 2 + page_tokens)
    return [
        s
        for s in (*prefills, *decodes, *mixed)
        if max((*s.prompts, *s.contexts)) <= longest
        and sum(s.prompts) + sum(s.contexts) <= room
        and len(s.prompts) + len(s.contexts) <= max_running
    ]


def _spread(batch: int) -> tuple[int, ...]:
    low, high = RAGGED_SPAN
    return tuple(low + (high - low) * i // (batch - 1) for i in range(batch))


@dataclass(frozen=True, slots=True)
class Steps:
    observations: tuple[Observation, ...]  # one per distinct shape
    complete: bool  # False when Ctrl-C cut the rounds short
    cpu_share: float  # CPU seconds over wall seconds and threads; well below 1 says that others used the cores


def measure_steps(
    model: Model, pool: PoolConfig, max_context: int, progress: Progress, *, rounds: int = ROUNDS, clock: Clock = "wall"
) -> Steps:
    """Runs the grid ``rounds`` times. ``clock`` "cpu" times the process's CPU seconds: on a machine that others use,
    with one thread, they come closer to what a step takes than the wall does."""
    grid = scenarios(
        max_context=max_context, kv_tokens=pool.kv_tokens, page_tokens=pool.page_tokens, max_running=pool.max_running
    )
    budgets = {s.step_tokens for s in grid}
    pools = {budget: pool_for(pool, budget, grid, max_context) for budget in budgets}
    engines = {budget: build_engine(model, own, max_context) for budget, own in pools.items()}
    seen: dict[StepShape, list[float]] = {}
    order = [scenario for round_ in range(rounds) for scenario in random.Random(round_).sample(grid, len(grid))]
    complete, watch = True, Watch(clock)
    try:
        for _ in range(2):  # the first steps pay for memory and thread pools
            warm = Scenario(max(budgets), (min(64, max_context // 2),), ())
            run_scenario(engines[max(budgets)], pools[max(budgets)], warm, {}, watch)
        for done, scenario in enumerate(order):
            progress(_describe(scenario), done / len(order))
            run_scenario(engines[scenario.step_tokens], pools[scenario.step_tokens], scenario, seen, watch)
    except KeyboardInterrupt:
        complete = False
    observations = tuple(_observation(shape, times) for shape, times in seen.items())
    return Steps(observations, complete, watch.cpu_s / max(watch.wall_s, 1e-9) / torch.get_num_threads())


class Watch:
    """Times one call after the other by the clock asked for, and adds up both."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.wall_s = self.cpu_s = 0.0

    def time_s(self, work: Callable[[], object]) -> float:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        cpu_s, wall_s = time.process_time() - cpu, time.perf_counter() - wall
        self.cpu_s += cpu_s
        self.wall_s += wall_s
        return cpu_s if self._clock == "cpu" else wall_s


def pool_for(pool: PoolConfig, step_tokens: int, grid: Sequence[Scenario], max_context: int) -> PoolConfig:
    """``pool`` with this budget and no more KV than its scenarios need: several engines are held at once."""
    most = max(sum(s.prompts) + sum(s.contexts) for s in grid if s.step_tokens == step_tokens)
    kv_tokens = min(pool.kv_tokens, max(max_context, most + 64 * (DECODE_STEPS + 2 + pool.page_tokens)))
    # Every token must be computed, in chunks that depend on nothing but the budget.
    alone = {"prefix_cache": False, "mixed_tokens": step_tokens}
    return pool.model_copy(update={"step_tokens": step_tokens, "kv_tokens": kv_tokens, **alone})


def _describe(scenario: Scenario) -> str:
    prefill = f"prefill {len(scenario.prompts)} x {scenario.prompts[0]}" if scenario.prompts else ""
    decode = f"decode {len(scenario.contexts)} x {max(scenario.contexts)}" if scenario.contexts else ""
    return " + ".join(filter(None, (prefill, decode)))


def _observation(shape: StepShape, times: Sequence[float]) -> Observation:
    middle = statistics.median(times)
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else (middle, middle, middle)
    return Observation(shape, middle, (quartiles[2] - quartiles[0]) / middle, len(times))


def run_scenario(
    engine: Engine, pool: PoolConfig, scenario: Scenario, seen: dict[StepShape, list[float]], watch: Watch
) -> None:
    """Runs the scenario to the end of its prefill, or DECODE_STEPS steps, and files each step's time by its shape."""
    twin = Scheduler(
        PagePool(pool.kv_tokens // pool.page_tokens, pool.page_tokens),
        step_tokens=scenario.step_tokens,
        max_running=pool.max_running,
        max_waiting=pool.max_waiting,
    )
    works = _enter(engine, twin, scenario)
    times: list[tuple[StepShape, float]] = []
    try:
        while len(times) < DECODE_STEPS if not scenario.prompts else twin.waiting_tokens:
            slices = twin.schedule(0.0)
            times.append((_shape(slices), watch.time_s(engine.step)))
            twin.advance(slices, 0.0)
    finally:
        for work in works:
            engine.release(work.request_id)
    if scenario.prompts:
        for shape, seconds in times:
            seen.setdefault(shape, []).append(seconds)
    else:
        # The contexts of consecutive steps differ by one: their median time belongs to the one in the middle.
        seen.setdefault(times[len(times) // 2][0], []).append(statistics.median(t for _, t in times[1:]))


def _enter(engine: Engine, twin: Scheduler, scenario: Scenario) -> list[Work]:
    works = []
    for at, context in enumerate(scenario.contexts):
        work = _work(f"decode-{at}", context - 1)  # the newest token attends to itself too
        engine.reserve(work)
        engine.start(work.request_id, TokenEvent(work.request_id, 0, 1))
        twin.reserve(_job(work), 0.0)
        twin.start(work.request_id)
        works.append(work)
    for at, tokens in enumerate(scenario.prompts):
        work = _work(f"prefill-{at}", tokens)
        engine.add(work)
        twin.add(_job(work), 0.0)
        works.append(work)
    return works


def _work(request_id: str, tokens: int) -> Work:
    prompt = tuple((7 * i) % 997 + 1 for i in range(tokens))
    return Work(request_id, prompt, Sampling(temperature=0.0, max_tokens=DECODE_STEPS + 2), 0, 3600.0)


def _job(work: Work) -> Job:
    return Job(work.request_id, len(work.prompt), work.sampling.max_tokens)


def _shape(slices: Sequence[Slice]) -> StepShape:
    chunks = tuple((part.start, part.count) for part in slices if not part.decode)
    return StepShape(chunks, tuple(part.start + 1 for part in slices if part.decode))
