"""Random arrivals, cancels and landings on tiny pools: nothing leaks, limits hold, everyone finishes."""

from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from baton.errors import InvalidRequest, Overloaded
from engine.pages import PagePool
from engine.scheduler import Scheduler
from engine.sequence import Job, Slice


class Serving(RuleBasedStateMachine):
    """Plays the engine: computes each step, remembers who has which KV, ends sequences at max_tokens."""

    @initialize(
        pages=st.integers(1, 12),
        page_tokens=st.integers(1, 5),
        step_tokens=st.integers(1, 16),
        max_running=st.integers(1, 6),
    )
    def build(self, pages: int, page_tokens: int, step_tokens: int, max_running: int) -> None:
        self.pool = PagePool(pages, page_tokens)
        self.scheduler = Scheduler(self.pool, step_tokens=step_tokens, max_running=max_running, max_waiting=6)
        self.jobs: dict[str, Job] = {}
        self.outputs: dict[str, int] = {}
        self.reserved: set[str] = set()
        self.held: set[str] = set()
        self.names = 0
        self.now_s = 0.0

    def _job(self, prompt: int, outputs: int, priority: int, prefill_only: bool) -> Job:
        self.names += 1
        return Job(f"r{self.names}", prompt, outputs, priority, prefill_only)

    def _enter(self, job: Job) -> None:
        self.jobs[job.request_id], self.outputs[job.request_id] = job, 0

    @rule(prompt=st.integers(1, 20), outputs=st.integers(1, 12), priority=st.integers(0, 2), prefill=st.booleans())
    def add(self, prompt: int, outputs: int, priority: int, prefill: bool) -> None:
        job = self._job(prompt, outputs, priority, prefill)
        with contextlib.suppress(InvalidRequest, Overloaded):
            self.scheduler.add(job, self.now_s)
            self._enter(job)

    @rule(prompt=st.integers(1, 20), outputs=st.integers(2, 12))
    def reserve(self, prompt: int, outputs: int) -> None:
        job = self._job(prompt, outputs, 0, False)
        with contextlib.suppress(InvalidRequest, Overloaded):
            pages = self.scheduler.reserve(job, self.now_s)
            assert len(pages) == self.pool.pages_for(prompt)
            self._enter(job)
            self.reserved.add(job.request_id)

    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        if self.reserved:
            name = data.draw(st.sampled_from(sorted(self.reserved)))
            self.scheduler.start(name)
            self.reserved.remove(name)
            self.outputs[name] = 1

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.jobs:
            self._forget(data.draw(st.sampled_from(sorted(self.jobs))))

    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    def _step(self) -> tuple[Slice, ...]:
        self.now_s += 1.0
        slices = self.scheduler.schedule(self.now_s)
        self._check_step(slices)
        self.scheduler.advance(slices, self.now_s)
        for part in slices:
            if part.samples:
                self._token(part.request_id)
        return slices

    def _check_step(self, slices: tuple[Slice, ...]) -> None:
        assert sum(part.count for part in slices) <= self.scheduler.step_tokens
        assert len({part.request_id for part in slices}) == len(slices) <= self.scheduler.max_running
        kinds = [part.decode for part in slices]
        assert kinds == sorted(kinds, reverse=True), "decodes come first"
        writes = set()
        for part in slices:
            assert part.count >= 1
            assert (part.start + part.count) <= len(part.pages) * self.pool.page_tokens
            for token in range(part.start, part.start + part.count):
                slot = (part.pages[token // self.pool.page_tokens], token % self.pool.page_tokens)
                assert slot not in writes, "two tokens of a step share a slot"
                writes.add(slot)

    def _token(self, name: str) -> None:
        job = self.jobs[name]
        self.outputs[name] += 1
        if job.prefill_only:
            self.held.add(name)
        elif self.outputs[name] == job.max_tokens:
            self._forget(name)

    def _forget(self, name: str) -> None:
        assert self.scheduler.release(name)
        assert not self.scheduler.release(name)
        del self.jobs[name], self.outputs[name]
        self.reserved.discard(name)
        self.held.discard(name)

    @invariant()
    def nothing_leaks(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            assert self.pool.high_water >= self.pool.used

    def teardown(self) -> None:
        """Once others let go of what they hold, every sequence finishes, and every page is free again."""
        if not hasattr(self, "scheduler"):
            return
        for name in sorted(self.reserved | self.held):
            self._forget(name)
        bound = 50 + 40 * sum(job.prompt_tokens + job.max_tokens for job in self.jobs.values())
        for _ in range(bound):
            if not self.jobs:
                break
            self._step()
            for name in sorted(self.held):
                self._forget(name)
        assert not self.jobs, "some sequence starved"
        assert self.pool.used == 0
        assert not self.scheduler.has_work


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=60), st.integers(1, 12))
def test_the_pool_counts_every_reference(actions: list[tuple[bool, int]], pages: int) -> None:
    pool = PagePool(pages, 4)
    owners: list[list[int]] = []
    for takes, number in actions:
        if takes and number <= pool.free:
            owners.append(pool.take(number))
        elif takes and owners:
            shared = owners[number % len(owners)]
            pool.share(shared)
            owners.append(list(shared))
        elif owners:
            pool.drop(owners.pop(number % len(owners)))
        pool.check_integrity(owners)
    for owned in owners:
        pool.drop(owned)
    assert pool.free == pages
