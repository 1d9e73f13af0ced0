"""One simulated worker: the real scheduler, a cost model in place of the accelerator.

A step that holds prefill goes through ``schedule`` and ``advance`` as in the engine. A run of plain decode steps of one
batch is taken as a whole: its step times are computed one by one from the cost model (the same sums in the same order
as without), only the scheduler's work and the event queue are skipped. What reaches the worker during a run cuts it at
the end of the step under way, where the engine would have taken it in.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

from baton.blocks import BlockJournal
from baton.messages import Load
from engine.fast_forward import DecodeRun, FastForward, MixedStep
from engine.pages import PagePool
from engine.prefix import Key
from engine.sequence import Job, Slice
from placement.cost import CostModel, decode_ends
from placement.events import Rank, Timeline
from placement.host import Host
from placement.meters import Meters
from placement.outcome import WorkerUse

LOOKAHEAD_STEPS = (8, 256)  # least and most decode steps whose times are computed ahead


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The engine settings of one worker, as in ``baton.config.PoolConfig``."""

    page_tokens: int = 16
    step_tokens: int = 2048
    max_running: int = 256
    max_waiting: int = 4096
    mixed_tokens: int = 0  # most prompt tokens of a step that also decodes; 0 leaves it to engine.pace
    gap_s: float = 0.1  # between two tokens of a stream, up to which prompts may stretch it


class Listener(Protocol):
    """Who hears of the tokens. ``prefilled`` is the first token of a ``prefill_only`` job, which keeps its pages."""

    def prefilled(self, replica: Replica, request_id: str, now_s: float) -> None: ...
    def first_token(self, replica: Replica, request_id: str, now_s: float) -> None: ...
    def finished(self, replica: Replica, request_id: str, now_s: float) -> None: ...
    def freed(self, replica: Replica) -> None: ...


@dataclass(slots=True)
class _Run:
    started_s: float
    ends_s: list[float]  # when each of its steps ends; the event is at the last


class Replica:
    """A worker that computes one step at a time. ``version`` changes whenever a planned end of step is void."""

    def __init__(
        self,
        name: str,
        cost: CostModel,
        limits: EngineLimits,
        *,
        kv_tokens: int,
        timeline: Timeline,
        listener: Listener,
        host: Host,
        fast: bool = True,
    ) -> None:
        self.name, self.cost, self.limits = name, cost, limits
        self.pool = PagePool(max(1, kv_tokens // limits.page_tokens), limits.page_tokens)
        self.scheduler = FastForward(
            self.pool,
            step_tokens=limits.step_tokens,
            max_running=limits.max_running,
            max_waiting=limits.max_waiting,
        )
        self.meters = Meters(step_tokens=limits.step_tokens, mixed_tokens=limits.mixed_tokens, gap_s=limits.gap_s)
        self.blocks = BlockJournal()  # of the prefix cache, whose pages are the blocks here
        self.scheduler.holdings.cache.on_change = self._note
        self.alive, self.draining = True, False
        self.handoffs = 0  # reserved but not landed (decode), sent but not landed (prefill)
        self.link_free_s = 0.0
        self.busy_s, self.steps = 0.0, 0
        self._timeline, self._listener, self._fast = timeline, listener, fast
        self._host = host
        self._version = 0
        self._step: MixedStep | None = None
        self._run: _Run | None = None
        self._ending = False
        self._started_s = self._ends_s = 0.0  # of the step under way
        self._ahead = LOOKAHEAD_STEPS[0]

    # ---- what the cluster asks

    def add(self, job: Job) -> None:
        """Queues ``job``; raises as the scheduler does."""
        self.settle()
        self.scheduler.add(job, self._timeline.now_s)
        self.wake()

    def reserve(self, job: Job) -> None:
        """Takes the pages of ``job``'s prompt; raises as the scheduler does."""
        self.settle()
        self.scheduler.reserve(job, self._timeline.now_s)
        self.handoffs += 1
        run = self._run
        if run is not None and self.pool.free < self.scheduler.running * (2 + len(run.ends_s) // self.pool.page_tokens):
            self.wake()  # the run might count on pages that are gone now

    def start(self, request_id: str) -> None:
        """The reserved pages of ``request_id`` hold its prompt and its first token is known."""
        self.settle()
        self.handoffs -= 1
        self.scheduler.start(request_id)
        self.wake()

    def wake(self) -> None:
        """Something was added, started or released: the next step may differ from what was planned."""
        if not self.alive or self._ending:
            return
        if self._run is not None:
            self._cut(self._run, self._timeline.now_s)
        elif self._step is None:
            self._begin(self._timeline.now_s)

    def release(self, request_id: str) -> None:
        """Frees a sequence whose step is not under way (held pages, lost reservations)."""
        self.settle()
        if self.scheduler.release(request_id):
            self._listener.freed(self)
            self.wake()

    def settle(self) -> None:
        """Brings the scheduler up to the steps of the current run that have ended by now; they stay ended."""
        run = self._run
        if run is None:
            return
        done = bisect_left(run.ends_s, self._timeline.now_s)
        if 0 < done < len(run.ends_s):
            self._account_run(run, done)
            self.scheduler.skip(done, run.ends_s[0], goes_on=True)
            run.started_s = run.ends_s[done - 1]
            del run.ends_s[:done]

    def load(self, *, line: int = 0) -> Load:
        """What the worker would push to routers now, with ``line`` requests before its pages."""
        self.settle()
        scheduler, meters = self.scheduler, self.meters
        return Load(
            waiting=scheduler.waiting + line,
            waiting_tokens=scheduler.waiting_tokens,
            running=scheduler.running,
            pages_used=self.pool.used,
            pages_total=self.pool.total,
            handoffs=self.handoffs,
            buffer_bytes_used=0,
            buffer_bytes_total=0,
            buffer_bytes_quarantined=0,
            prompt_token_s=meters.prompts.token_s,
            step_s=meters.steps.step_s,
            sequence_s=meters.steps.sequence_s,
        )

    def kill(self) -> None:
        """Ends at once; every sequence is gone. The caller knows which those were."""
        self.alive = False
        self._version += 1
        self._step = self._run = None
        self._host.rests(self)

    def outputs(self, request_id: str) -> int:
        """Output tokens of ``request_id`` so far."""
        self.settle()
        return self.scheduler.outputs(request_id)

    def use(self) -> WorkerUse:
        scheduler, pool, holdings = self.scheduler, self.pool, self.scheduler.holdings
        return WorkerUse(
            self.busy_s,
            self.steps,
            pool.high_water,
            pool.total,
            scheduler.preemptions,
            holdings.entered_tokens,
            holdings.hit_tokens,
        )

    def _note(self, key: Key, held: bool) -> None:
        self.blocks.change((cast(int, key),), held=held)

    @property
    def next_call_s(self) -> float:
        """When the engine's thread next takes what is asked of it: between two steps."""
        now_s, run = self._timeline.now_s, self._run
        if run is not None:
            return run.ends_s[bisect_left(run.ends_s, now_s)]
        return self._ends_s if self._step is not None else now_s

    def retime(self, ratio: float) -> None:
        """From now on the step under way takes ``ratio`` times the time it would have."""
        self.settle()
        now_s, run = self._timeline.now_s, self._run
        if run is not None:
            del run.ends_s[1:]
            run.ends_s[0] = self._ends_s = now_s + ratio * (run.ends_s[0] - now_s)
            self._expect(self._ends_s, self._end_run, run.started_s)
        elif self._step is not None:
            self._ends_s = now_s + ratio * (self._ends_s - now_s)
            self._expect(self._ends_s, self._end_step, self._started_s)

    # ---- steps

    def _begin(self, now_s: float) -> None:
        if self._fast and (run := self.scheduler.decode_run(now_s)) is not None:
            self._begin_run(run, now_s)
            return
        self.scheduler.mixed_tokens = self.meters.mixed_tokens
        step = self.scheduler.mixed(now_s) if self._fast else MixedStep(0, 0, self.scheduler.schedule(now_s))
        if not (step.decodes or step.slices):
            self._host.rests(self)
            return
        self._step, self._started_s = step, now_s
        self._ends_s = self._end_s(step, now_s)
        self._expect(self._ends_s, self._end_step, now_s)

    def _expect(self, time_s: float, end: Callable[[float], None], started_s: float) -> None:
        self._version += 1
        version = self._version

        def fire() -> None:
            if version == self._version:
                end(started_s)

        self._timeline.at(time_s, Rank.STEP, fire)

    def _end_s(self, step: MixedStep, now_s: float) -> float:
        chunks, decodes, context, prompts = [], step.decodes, step.context, 0
        for part in step.slices:
            if part.decode:
                decodes, context = decodes + 1, context + part.start + part.count
            else:
                chunks.append((part.start, part.count))
                prompts += part.samples
        step_s = self.cost.sum_s(chunks, decodes, context)
        self._host.computes(self, step_s, prompts=prompts, tokens=decodes + prompts)
        return now_s + self._host.factor * step_s

    def _end_step(self, started_s: float) -> None:
        now_s = self._timeline.now_s
        step, self._step = cast(MixedStep, self._step), None
        self._account(started_s, now_s, 1)
        prompts = [part.count for part in step.slices if not part.decode]
        decodes = step.decodes + len(step.slices) - len(prompts)
        self.meters.stepped(decodes, sum(prompts), now_s - started_s)
        full = self.scheduler.give(now_s) if step.decodes else []
        self.scheduler.advance(step.slices, now_s)
        self._ending = True
        for request_id in full:
            self._finish(request_id, now_s)
        for part in step.slices:
            if part.samples:
                self._sampled(part, now_s)
        self._next(now_s)

    def _sampled(self, part: Slice, now_s: float) -> None:
        if part.prefill_only:
            self._listener.prefilled(self, part.request_id, now_s)
            return
        if not part.decode:
            self._listener.first_token(self, part.request_id, now_s)
        if self.scheduler.full(part.request_id):
            self._finish(part.request_id, now_s)

    def _finish(self, request_id: str, now_s: float) -> None:
        self.scheduler.release(request_id)
        self._listener.finished(self, request_id, now_s)
        self._listener.freed(self)

    def _next(self, now_s: float) -> None:
        self._ending = False
        if self.alive:
            self._begin(now_s)

    # ---- runs of decode steps

    def _begin_run(self, run: DecodeRun, now_s: float) -> None:
        steps, host = min(run.steps, self._ahead), self._host
        if host.machine is not None:
            host.computes(self, self.cost.decode_step_s(run.decodes, run.context), prompts=0, tokens=run.decodes)
            steps = 1 if host.machine.token_s else steps  # of the longer steps that follow each wants a little less
        ends_s = decode_ends(self.cost, run.decodes, run.context, now_s=now_s, steps=steps, slowdown=host.factor)
        self._ahead = min(2 * self._ahead, LOOKAHEAD_STEPS[1])
        self._run = _Run(now_s, ends_s)
        self._expect(ends_s[-1], self._end_run, now_s)

    def _cut(self, run: _Run, now_s: float) -> None:
        """Lets the run end with the step under way."""
        last = bisect_left(run.ends_s, now_s)
        if last + 1 < len(run.ends_s):
            del run.ends_s[last + 1 :]
            self._ahead = max(LOOKAHEAD_STEPS[0], last + 1)
            self._expect(run.ends_s[-1], self._end_run, run.started_s)

    def _end_run(self, _: float) -> None:
        now_s = self._timeline.now_s
        run, self._run = cast(_Run, self._run), None
        self._account_run(run, len(run.ends_s))
        self._ending = True
        for request_id in self.scheduler.skip(len(run.ends_s), run.ends_s[0], goes_on=False):
            self._finish(request_id, now_s)
        self._next(now_s)

    def _account_run(self, run: _Run, steps: int) -> None:
        """The first ``steps`` of ``run`` have ended."""
        self._account(run.started_s, run.ends_s[steps - 1], steps)
        self.meters.decoded(self.scheduler.running, run.started_s, run.ends_s[:steps])

    def _account(self, started_s: float, ended_s: float, steps: int) -> None:
        self.busy_s += ended_s - started_s
        self.steps += steps
