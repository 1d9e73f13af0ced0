"""Random arrivals, cancels and landings on tiny pools: nothing leaks, limits hold, everyone finishes, and every token's
KV is where its block table says, whether computed, landed, copied or found in the prefix cache."""

from __future__ import annotations

import contextlib
from typing import TypeAlias

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from baton.errors import InvalidRequest, Overloaded
from engine.pages import PagePool
from engine.scheduler import Scheduler
from engine.sequence import Job, Slice

Held: TypeAlias = tuple[str, tuple[int, ...]]
"""What a slot of the KV cache holds: whose lossy codec changed it, if any, and the tokens up to this one."""

PROMPTS = st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=2), st.integers(1, 20))
"""A few tokens that repeat up to a length: many prompts begin alike."""


class Serving(RuleBasedStateMachine):
    """Plays the engine: computes each step, remembers what every slot holds, ends sequences at max_tokens."""

    @initialize(
        pages=st.integers(1, 12),
        page_tokens=st.integers(1, 5),
        step_tokens=st.integers(1, 16),
        mixed_tokens=st.sampled_from([None, 1, 3]),
        max_running=st.integers(1, 6),
        caches=st.booleans(),
    )
    def build(
        self,
        *,
        pages: int,
        page_tokens: int,
        step_tokens: int,
        mixed_tokens: int | None,
        max_running: int,
        caches: bool,
    ) -> None:
        self.pool = PagePool(pages, page_tokens)
        self.scheduler = Scheduler(
            self.pool, step_tokens=step_tokens, max_running=max_running, max_waiting=6, mixed_tokens=mixed_tokens
        )
        self.caches = caches
        self.slots: dict[tuple[int, int], Held] = {}
        self.jobs: dict[str, Job] = {}
        self.tokens: dict[str, list[int]] = {}
        self.reserved: dict[str, tuple[int, ...]] = {}
        self.told: dict[str, tuple[int, tuple[int, ...]]] = {}  # of prefill_only: tokens announced, block table
        self.held: set[str] = set()
        self.names = 0
        self.now_s = 0.0

    def _job(self, prompt: tuple[list[int], int], outputs: int, priority: int, prefill_only: bool) -> Job:
        self.names += 1
        pattern, length = prompt
        tokens = (pattern * length)[:length]
        self.tokens[name := f"r{self.names}"] = tokens
        size = self.pool.page_tokens
        keys = tuple(tuple(tokens[:end]) for end in range(size, length + 1, size)) if self.caches else ()
        return Job(name, length, outputs, priority, prefill_only, keys)

    @rule(prompt=PROMPTS, outputs=st.integers(1, 12), priority=st.integers(0, 2), prefill=st.booleans())
    def add(self, prompt: tuple[list[int], int], outputs: int, priority: int, prefill: bool) -> None:
        job = self._job(prompt, outputs, priority, prefill)
        with contextlib.suppress(InvalidRequest, Overloaded):
            self.scheduler.add(job, self.now_s)
            self.jobs[job.request_id] = job

    @rule(prompt=PROMPTS, outputs=st.integers(2, 12), priority=st.integers(0, 1))
    def reserve(self, prompt: tuple[list[int], int], outputs: int, priority: int) -> None:
        job = self._job(prompt, outputs, priority, False)
        with contextlib.suppress(InvalidRequest, Overloaded):
            pages = self.scheduler.reserve(job, self.now_s)
            assert len(pages) == self.pool.pages_for(job.prompt_tokens)
            self.jobs[job.request_id] = job
            self.reserved[job.request_id] = pages

    @rule(data=st.data(), exact=st.booleans())
    def land(self, data: st.DataObject, exact: bool) -> None:
        if self.reserved:
            name = data.draw(st.sampled_from(sorted(self.reserved)))
            self._write(name, self.reserved.pop(name), 0, self.jobs[name].prompt_tokens, "" if exact else name)
            self.scheduler.start(name, exact=exact)
            self._append(name)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.jobs:
            self._forget(data.draw(st.sampled_from(sorted(self.jobs))))

    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    def _step(self) -> None:
        self.now_s += 1.0
        slices = self.scheduler.schedule(self.now_s)
        self._check_step(slices)
        copies = {part.copy[1]: part.copy[0] for part in slices if part.copy}
        size = self.pool.page_tokens
        self.slots |= {(to, at): self.slots[of, at] for to, of in copies.items() for at in range(size)}
        for part in slices:
            self._compute(part)
        self.scheduler.advance(slices, self.now_s)
        for part in slices:
            if part.samples:
                self._append(part.request_id)
                if part.prefill_only:
                    self.held.add(part.request_id)
                elif self._outputs(part.request_id) == self.jobs[part.request_id].max_tokens:
                    self._forget(part.request_id)
        for name in self.held:
            self._expect(name, self.told[name][1], self.jobs[name].prompt_tokens, "")

    def _check_step(self, slices: tuple[Slice, ...]) -> None:
        assert sum(part.count for part in slices) <= self.scheduler.step_tokens
        assert len({part.request_id for part in slices}) == len(slices) <= self.scheduler.max_running
        kinds = [part.decode for part in slices]
        assert kinds == sorted(kinds, reverse=True), "decodes come first"
        if any(kinds):
            assert sum(part.count for part in slices if not part.decode) <= self.scheduler.mixed_tokens
        writes = set()
        for part in slices:
            assert part.count >= 1
            for slot in self._slots(part.pages, part.start, part.start + part.count):
                assert slot not in writes, "two tokens of a step share a slot"
                writes.add(slot)
        for page in {page for page, _ in writes}:
            assert self.pool._references(page) == 1, "a shared page is written"

    def _compute(self, part: Slice) -> None:
        lossy = "" if self.scheduler._sequences[part.request_id].publishes or part.prefill_only else part.request_id
        self._expect(part.request_id, part.pages, part.start, lossy)
        self._write(part.request_id, part.pages, part.start, part.start + part.count, lossy)
        if part.prefill_only:
            before, _ = self.told.get(part.request_id, (0, ()))
            assert part.start - part.cached == before, "the announced chunks join"
            self.told[part.request_id] = (part.start + part.count, part.pages)

    def _slots(self, pages: tuple[int, ...], start: int, end: int) -> list[tuple[int, int]]:
        size = self.pool.page_tokens
        return [(pages[token // size], token % size) for token in range(start, end)]

    def _write(self, name: str, pages: tuple[int, ...], start: int, end: int, lossy: str) -> None:
        for token, slot in enumerate(self._slots(pages, start, end), start):
            self.slots[slot] = (lossy, tuple(self.tokens[name][: token + 1]))

    def _expect(self, name: str, pages: tuple[int, ...], end: int, lossy: str) -> None:
        for token, slot in enumerate(self._slots(pages, 0, end)):
            assert self.slots[slot] == (lossy, tuple(self.tokens[name][: token + 1])), "the wrong KV is read"

    def _outputs(self, name: str) -> int:
        return len(self.tokens[name]) - self.jobs[name].prompt_tokens

    def _append(self, name: str) -> None:
        tokens = self.tokens[name]
        tokens.append(sum(tokens) % 2)  # the same prompt has the same answer
        if self.caches and len(tokens) % self.pool.page_tokens == 0:
            self.scheduler.identify(name, tuple(tokens))

    def _forget(self, name: str) -> None:
        assert self.scheduler.release(name)
        assert not self.scheduler.release(name)
        del self.jobs[name], self.tokens[name]
        self.reserved.pop(name, None)
        self.told.pop(name, None)
        self.held.discard(name)

    @invariant()
    def nothing_leaks(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        assert self.pool.high_water >= self.pool.used
        for sequence in self.scheduler._sequences.values():
            assert len(sequence.pages) * self.pool.page_tokens - sequence.known < self.pool.page_tokens, "wasted pages"

    def teardown(self) -> None:
        """Once others let go of what they hold, every sequence finishes, and every page is free again."""
        if not hasattr(self, "scheduler"):
            return
        for name in sorted(set(self.reserved) | self.held):
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
