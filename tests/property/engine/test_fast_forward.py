"""A batch taken as one and its sequences taken one by one: the same steps, pages and tokens, whoever looks when."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import InvalidRequest, Overloaded
from engine.fast_forward import FastForward
from engine.pages import PagePool
from engine.scheduler import Scheduler
from engine.sequence import Job, Slice

STEPS = 5000  # more than any of these needs, computing everything again several times

JOBS = st.lists(
    st.tuples(
        st.sampled_from(["add", "hand over"]),
        st.integers(1, 40),  # prompt
        st.integers(2, 12),  # output: who is handed over has one token already
        st.integers(0, 1),  # priority
        st.integers(0, 3),  # steps until the next one
    ),
    min_size=1,
    max_size=12,
)


class Single:
    """The scheduler, told of every step; what it computes is (decodes, their contexts' sum, prompts' chunks)."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def step(self, now_s: float, most: int) -> tuple[int, list[tuple[int, int, list[tuple[str, int, int]]]]]:
        step = self.scheduler.schedule(now_s)
        self.scheduler.advance(step, now_s)
        self._release(step)
        return 1, [(*_sums(step), _chunks(step))]

    def _release(self, step: tuple[Slice, ...]) -> None:
        for part in step:
            if part.samples and self.scheduler.outputs(part.request_id) >= _wanted(part.request_id):
                self.scheduler.release(part.request_id)


class Batched(Single):
    """The same, several steps at once where that is possible."""

    scheduler: FastForward

    def step(self, now_s: float, most: int) -> tuple[int, list[tuple[int, int, list[tuple[str, int, int]]]]]:
        fast = self.scheduler
        if run := fast.decode_run(now_s):
            taken = min(run.steps, most)
            first, rest = max(1, taken // 2), taken - max(1, taken // 2)
            full = fast.skip(first, now_s, goes_on=rest > 0)
            if rest:
                assert not full
                full = fast.skip(rest, now_s, goes_on=False)
            self._end(full)
            return taken, [(run.decodes, run.context + n * run.decodes, []) for n in range(taken)]
        step = fast.mixed(now_s)
        decodes, context = _sums(step.slices)
        full = fast.give(now_s) if step.decodes else []
        fast.advance(step.slices, now_s)
        self._end(full)
        self._release(step.slices)
        return 1, [(step.decodes + decodes, step.context + context, _chunks(step.slices))]

    def _end(self, full: list[str]) -> None:
        for request_id in full:
            assert self.scheduler.full(request_id)
            self.scheduler.release(request_id)


def _sums(step: tuple[Slice, ...]) -> tuple[int, int]:
    contexts = [part.start + part.count for part in step if part.decode]
    return len(contexts), sum(contexts)


def _chunks(step: tuple[Slice, ...]) -> list[tuple[str, int, int]]:
    return [(part.request_id, part.start, part.count) for part in step if not part.decode]


def _wanted(request_id: str) -> int:
    return int(request_id.rpartition("/")[2])


@settings(max_examples=300, deadline=None)
@given(jobs=JOBS, page_tokens=st.sampled_from([1, 4, 16]), pages=st.integers(4, 40), running=st.sampled_from([1, 3, 8]),
       mixed=st.sampled_from([1, 8, 64]), look=st.booleans())  # fmt: skip
def test_a_batch_and_its_sequences_are_alike(
    *, jobs: list[tuple[str, int, int, int, int]], page_tokens: int, pages: int, running: int, mixed: int, look: bool
) -> None:
    limits = {"step_tokens": 64, "max_running": running, "max_waiting": 100, "mixed_tokens": mixed}
    one = Single(Scheduler(PagePool(pages, page_tokens), **limits))
    many = Batched(FastForward(PagePool(pages, page_tokens), **limits))
    coming = [(f"{n}/{job[2]}", *job) for n, job in enumerate(jobs)]
    seen: list[object] = []
    wait = 0
    for _ in range(STEPS):
        while coming and wait <= 0:
            wait = _enter((one.scheduler, many.scheduler), coming.pop(0))
        taken, ours = many.step(0.0, max(1, wait) if coming else STEPS)
        for _ in range(taken):
            theirs = one.step(0.0, 1)[1]
            seen += theirs
            assert theirs == ours[:1]
            ours = ours[1:]
        wait -= taken
        if look:  # whoever looks changes nothing
            many.scheduler.check_integrity()
        ends = (one.scheduler, many.scheduler)
        assert len({end.pool.free for end in ends}) == 1
        assert len({(end.running, end.waiting, end.waiting_tokens, end.preemptions) for end in ends}) == 1
        if not (coming or one.scheduler.has_work):
            break
    many.scheduler.check_integrity()
    assert one.scheduler.pool.high_water == many.scheduler.pool.high_water
    assert not many.scheduler.has_work
    assert seen


def _enter(schedulers: tuple[Scheduler, Scheduler], job: tuple[str, str, int, int, int, int]) -> int:
    """Both take it or neither does; returns the steps until the next one comes."""
    request_id, how, prompt, output, priority, gap = job
    told = Job(request_id, prompt, output, priority)
    failures = []
    for scheduler in schedulers:
        try:
            if how == "add":
                scheduler.add(told, 0.0)
            else:
                scheduler.reserve(told, 0.0)
                scheduler.start(request_id)
        except (Overloaded, InvalidRequest) as error:
            failures.append(type(error))
    assert len(failures) in (0, 2)
    return gap


def test_looking_at_a_sequence_in_the_middle_of_a_run_shows_its_tokens() -> None:
    fast = FastForward(PagePool(8, 4), step_tokens=8, max_running=4, max_waiting=4)
    fast.reserve(Job("a", 4, 9), 0.0)
    fast.start("a")
    run = fast.decode_run(1.0)
    assert run is not None
    assert (run.decodes, run.context, run.steps) == (1, 5, 8)
    assert fast.skip(3, 2.0, goes_on=True) == []
    assert fast.outputs("a") == 4
    assert fast.timing("a").first_token_s == pytest.approx(2.0)
    fast.check_integrity()
    assert fast.skip(5, 9.0, goes_on=False) == ["a"]
    assert fast.release("a")
    assert fast.pool.free == 8
