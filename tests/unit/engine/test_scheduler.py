"""The scheduler's order, budget and preemption, step by step. Time is whatever the test says."""

from __future__ import annotations

import pytest

from baton.errors import InvalidRequest, NotFound, Overloaded
from engine.pages import PageIntegrityError, PagePool
from engine.scheduler import Scheduler
from engine.sequence import Job, Slice, Timing


def scheduler(
    pages: int = 16, page_tokens: int = 4, step_tokens: int = 8, max_running: int = 4, max_waiting: int = 8
) -> Scheduler:
    pool = PagePool(pages, page_tokens)
    return Scheduler(pool, step_tokens=step_tokens, max_running=max_running, max_waiting=max_waiting)


def step(queue: Scheduler, now_s: float = 0.0) -> list[tuple[str, int, int, bool]]:
    """One computed step as (request, start, count, samples)."""
    slices = queue.schedule(now_s)
    queue.advance(slices, now_s)
    queue.check_integrity()
    return [(s.request_id, s.start, s.count, s.samples) for s in slices]


def test_long_prompt_is_cut_into_chunks_and_then_decodes() -> None:
    queue = scheduler(step_tokens=4)
    queue.add(Job("a", 10, 3), 0.0)
    assert step(queue) == [("a", 0, 4, False)]
    assert queue.waiting_tokens == 6
    assert step(queue) == [("a", 4, 4, False)]
    assert step(queue) == [("a", 8, 2, True)]
    assert queue.waiting_tokens == 0
    assert step(queue) == [("a", 10, 1, True)]


def test_decodes_go_first_then_begun_prefills_then_new_ones() -> None:
    queue = scheduler(step_tokens=8)
    queue.add(Job("decode", 2, 9), 0.0)
    queue.add(Job("long", 12, 9), 0.0)
    assert step(queue) == [("decode", 0, 2, True), ("long", 0, 6, False)]
    queue.add(Job("new", 3, 9), 0.0)
    assert step(queue) == [("decode", 2, 1, True), ("long", 6, 6, True), ("new", 0, 1, False)]
    assert step(queue) == [("decode", 3, 1, True), ("long", 12, 1, True), ("new", 1, 2, True)]
    assert [name for name, *_ in step(queue)] == ["decode", "long", "new"]


def test_the_tokens_of_a_step_go_to_the_prefill_of_higher_priority() -> None:
    queue = scheduler(step_tokens=8)
    queue.add(Job("decode", 2, 9), 0.0)
    queue.add(Job("long", 12, 9), 0.0)
    step(queue)
    queue.add(Job("urgent", 9, 9, priority=5), 0.0)
    assert step(queue) == [("decode", 2, 1, True), ("urgent", 0, 7, False)]
    assert step(queue) == [("decode", 3, 1, True), ("urgent", 7, 2, True), ("long", 6, 5, False)]
    assert [name for name, *_ in step(queue)] == ["urgent", "decode", "long"]


def test_new_sequences_enter_by_priority_then_by_age() -> None:
    queue = scheduler(step_tokens=1, max_running=1)
    for name, priority in (("old", 0), ("young", 0), ("urgent", 7)):
        queue.add(Job(name, 1, 1, priority), 0.0)
    order = []
    while queue.has_work:
        [(name, _, _, _)] = step(queue)
        order.append(name)
        queue.release(name)
    assert order == ["urgent", "old", "young"]


def test_no_more_run_than_max_running_or_than_a_step_has_tokens() -> None:
    queue = scheduler(step_tokens=3, max_running=64)
    for name in "abcde":
        queue.add(Job(name, 1, 5), 0.0)
    assert len(step(queue)) == 3
    assert [name for name, *_ in step(queue)] == ["a", "b", "c"]
    assert (queue.running, queue.waiting) == (3, 2)


def test_none_overtakes_a_sequence_that_waits_for_pages() -> None:
    queue = scheduler(pages=4, page_tokens=4, step_tokens=16)
    queue.add(Job("holder", 8, 2), 0.0)
    queue.add(Job("big", 12, 2), 0.0)
    queue.add(Job("small", 1, 2), 0.0)
    assert [name for name, *_ in step(queue)] == ["holder"]
    queue.release("holder")
    assert [name for name, *_ in step(queue)] == ["big", "small"]


def test_the_lowest_priority_and_then_the_latest_is_preempted_and_comes_back() -> None:
    queue = scheduler(pages=3, page_tokens=2, step_tokens=8)
    queue.add(Job("first", 2, 3), 0.0)
    queue.add(Job("second", 2, 3), 0.0)
    assert len(step(queue)) == 2
    # Each wants a second page and one is free: the older one gets it, the younger one loses its own.
    assert step(queue) == [("first", 2, 1, True)]
    assert (queue.preemptions, queue.waiting, queue.running) == (1, 1, 1)
    queue.release("first")
    assert step(queue) == [("second", 0, 3, True)]  # prompt and first output, computed again
    assert step(queue) == [("second", 3, 1, True)]


def test_preempting_goes_on_until_a_page_is_really_free() -> None:
    queue = scheduler(pages=3, page_tokens=2, step_tokens=8)
    for name in "abc":
        queue.add(Job(name, 2, 3), 0.0)
    slices = queue.schedule(0.0)
    queue.advance(slices, 0.0)
    queue.pool.share(slices[2].pages)  # as a prefix cache would: losing c's page frees nothing
    [part] = queue.schedule(1.0)
    assert (part.request_id, queue.preemptions) == ("a", 2)
    queue.pool.drop(slices[2].pages)
    queue.check_integrity()


def test_a_more_important_sequence_takes_pages_from_a_less_important_one() -> None:
    queue = scheduler(pages=3, page_tokens=2, step_tokens=8)
    queue.add(Job("minor", 2, 4, priority=0), 0.0)
    step(queue)
    queue.add(Job("major", 3, 4, priority=1), 0.0)
    assert step(queue) == [("minor", 2, 1, True)]  # its own second page is taken before major enters
    queue.release("minor")
    queue.add(Job("minor", 2, 4, priority=0), 0.0)
    assert step(queue) == [("major", 0, 3, True), ("minor", 0, 2, True)]
    assert step(queue) == [("major", 3, 1, True)]
    assert queue.preemptions == 1


def test_a_waiting_sequence_takes_the_place_of_a_less_important_one() -> None:
    queue = scheduler(max_running=2)
    queue.add(Job("old", 2, 9), 0.0)
    queue.add(Job("young", 2, 9), 0.0)
    step(queue)
    queue.add(Job("equal", 2, 9), 0.0)
    assert [name for name, *_ in step(queue)] == ["old", "young"]
    queue.add(Job("urgent", 2, 9, priority=1), 0.0)
    assert step(queue) == [("old", 3, 1, True), ("urgent", 0, 2, True)]
    assert (queue.preemptions, queue.waiting) == (1, 2)
    queue.release("urgent")
    assert step(queue) == [("old", 4, 1, True), ("young", 0, 4, True)]


def test_as_few_pages_are_taken_from_the_less_important_as_suffice() -> None:
    queue = scheduler(pages=6, page_tokens=4, step_tokens=32)
    for name, priority in (("a", 1), ("b", 0), ("c", 0)):
        queue.add(Job(name, 5, 4, priority), 0.0)
    step(queue)
    queue.add(Job("urgent", 7, 1, priority=2), 0.0)
    assert step(queue) == [("a", 5, 1, True), ("b", 5, 1, True), ("urgent", 0, 7, True)]
    queue.add(Job("huge", 24, 1, priority=1), 0.0)
    step(queue)
    assert queue.preemptions == 1  # not even all of lower priority would suffice, so none is


def test_a_landed_sequence_takes_the_place_of_a_less_important_one() -> None:
    queue = scheduler(max_running=1)
    queue.add(Job("minor", 2, 9), 0.0)
    step(queue)
    for name, priority in (("equal", 0), ("major", 1)):
        queue.reserve(Job(name, 2, 9, priority), 0.0)
        queue.start(name)
    assert [name for name, *_ in step(queue)] == ["major"]
    queue.release("major")
    assert [name for name, *_ in step(queue)] == ["equal"]


def test_a_reservation_takes_pages_from_the_less_important() -> None:
    queue = scheduler(pages=3, page_tokens=2)
    queue.add(Job("minor", 5, 2), 0.0)
    step(queue)
    with pytest.raises(Overloaded):
        queue.reserve(Job("equal", 2, 2), 0.0)
    assert len(queue.reserve(Job("major", 2, 2, priority=1), 0.0)) == 1
    assert (queue.preemptions, queue.waiting) == (1, 1)
    queue.reserve(Job("more", 2, 2, priority=1), 0.0)  # what minor waits for is not kept for it
    queue.check_integrity()


def test_pages_that_others_may_be_reading_are_taken_by_nobody() -> None:
    queue = scheduler(pages=2, page_tokens=4)
    queue.add(Job("sending", 8, 1, prefill_only=True), 0.0)
    queue.add(Job("urgent", 8, 1, priority=9), 0.0)
    queue.release("urgent")
    assert step(queue) == [("sending", 0, 8, True)]
    queue.add(Job("urgent", 8, 1, priority=9), 0.0)
    assert step(queue) == []
    assert queue.preemptions == 0


def test_when_the_only_running_sequence_loses_its_pages_a_landed_one_gets_its_place() -> None:
    queue = scheduler(pages=3, page_tokens=1, max_running=1)
    queue.add(Job("running", 1, 3), 0.0)
    step(queue)
    queue.reserve(Job("landed", 2, 1), 0.0)
    queue.start("landed")
    assert step(queue) == [("landed", 2, 1, True)]  # into the page that the other had
    assert (queue.running, queue.waiting) == (1, 1)
    queue.release("landed")
    assert step(queue) == [("running", 0, 2, True)]


def test_prompts_beside_decodes_are_cut_to_mixed_tokens() -> None:
    pool = PagePool(16, 4)
    queue = Scheduler(pool, step_tokens=16, max_running=4, max_waiting=8, mixed_tokens=3)
    queue.add(Job("decode", 12, 9), 0.0)
    assert step(queue) == [("decode", 0, 12, True)]  # nobody waits for a token here
    queue.add(Job("new", 7, 9), 0.0)
    assert step(queue) == [("decode", 12, 1, True), ("new", 0, 3, False)]
    assert step(queue) == [("decode", 13, 1, True), ("new", 3, 3, False)]
    queue.mixed_tokens = 16
    assert step(queue) == [("decode", 14, 1, True), ("new", 6, 1, True)]


def test_a_sequence_that_can_never_fit_is_refused() -> None:
    queue = scheduler(pages=2, page_tokens=4)
    with pytest.raises(InvalidRequest, match="9 tokens can never fit"):
        queue.add(Job("a", 5, 5), 0.0)
    with pytest.raises(InvalidRequest, match="can never fit"):
        queue.reserve(Job("a", 5, 5), 0.0)
    queue.add(Job("a", 5, 4), 0.0)
    queue.add(Job("b", 8, 500, prefill_only=True), 0.0)
    with pytest.raises(InvalidRequest, match="already here"):
        queue.add(Job("a", 1, 1), 0.0)
    with pytest.raises(InvalidRequest, match="at least one"):
        queue.add(Job("c", 0, 1), 0.0)


def test_too_many_waiting_is_overload() -> None:
    queue = scheduler(max_waiting=1)
    queue.add(Job("a", 1, 1), 0.0)
    with pytest.raises(Overloaded) as refused:
        queue.add(Job("b", 1, 1), 0.0)
    assert refused.value.retry_after_ms > 0


def test_prefill_only_holds_its_pages_until_released() -> None:
    queue = scheduler(pages=3)
    queue.add(Job("a", 9, 5, prefill_only=True), 0.0)
    assert step(queue) == [("a", 0, 8, False)]
    assert step(queue) == [("a", 8, 1, True)]
    assert (queue.has_work, queue.running, queue.pool.used) == (False, 0, 3)
    assert step(queue) == []
    assert queue.release("a")
    assert not queue.release("a")
    assert queue.pool.used == 0


def test_prefill_only_is_never_preempted() -> None:
    queue = scheduler(pages=3, page_tokens=2, step_tokens=4)
    queue.add(Job("decode", 2, 4), 0.0)
    queue.add(Job("sending", 4, 1, prefill_only=True), 0.0)
    assert step(queue) == [("decode", 0, 2, True), ("sending", 0, 2, False)]
    assert step(queue) == [("sending", 2, 2, True)]  # the decode found no page and gave its own back
    assert step(queue) == []  # its three tokens need two pages, one is free
    assert queue.has_work
    queue.release("sending")
    assert step(queue) == [("decode", 0, 3, True)]


def test_reserved_pages_are_decoded_from_after_start() -> None:
    queue = scheduler(pages=4, page_tokens=4)
    pages = queue.reserve(Job("a", 6, 4), 1.0)
    assert len(pages) == 2
    assert not queue.has_work
    with pytest.raises(Overloaded, match="3 pages wanted, 2 of 4 free"):
        queue.reserve(Job("b", 9, 1), 1.0)
    queue.start("a")
    assert (queue.waiting, queue.has_work) == (1, True)
    [part] = queue.schedule(2.0)
    assert part == Slice("a", 6, 1, pages, samples=True, decode=True, prefill_only=False)
    assert queue.timing("a") == Timing(1.0, 2.0, None)
    queue.advance((part,), 3.0)
    assert queue.timing("a") == Timing(1.0, 2.0, 3.0)
    with pytest.raises(InvalidRequest, match="not reserved"):
        queue.start("a")
    with pytest.raises(NotFound):
        queue.start("nobody")


def test_first_token_time_stays_that_of_the_first_token() -> None:
    queue = scheduler()
    queue.add(Job("a", 2, 5), 1.0)
    step(queue, 2.0)
    step(queue, 3.0)
    assert queue.timing("a") == Timing(1.0, 2.0, 2.0)


def test_stage_seconds_of_a_timing() -> None:
    assert (Timing(1.0).queue_s, Timing(1.0).prefill_s) == (0.0, 0.0)
    assert (Timing(1.0, 3.0).queue_s, Timing(1.0, 3.0).prefill_s) == (2.0, 0.0)
    assert Timing(1.0, 3.0, 7.0).prefill_s == 4.0


def test_reserved_and_ready_sequences_can_be_released() -> None:
    queue = scheduler()
    queue.reserve(Job("a", 6, 4), 0.0)
    queue.reserve(Job("b", 6, 4), 0.0)
    queue.start("b")
    queue.add(Job("c", 3, 3), 0.0)
    assert all(queue.release(name) for name in "abc")
    assert queue.pool.used == 0
    queue.check_integrity()


def test_reservations_leave_the_pages_that_preempted_sequences_wait_for() -> None:
    queue = scheduler(pages=3, page_tokens=2, step_tokens=8)
    queue.add(Job("first", 2, 3), 0.0)
    queue.add(Job("second", 2, 3), 0.0)
    step(queue)
    step(queue)  # second is preempted and waits for two pages; one is free
    with pytest.raises(Overloaded, match="1 pages wanted, 0 of 3 free"):
        queue.reserve(Job("newcomer", 1, 1), 0.0)
    queue.release("first")
    assert len(queue.reserve(Job("newcomer", 1, 1), 0.0)) == 1


def test_ready_sequences_wait_for_a_place() -> None:
    queue = scheduler(max_running=1)
    queue.add(Job("a", 2, 5), 0.0)
    step(queue)
    queue.reserve(Job("b", 2, 5), 0.0)
    queue.start("b")
    assert [name for name, *_ in step(queue)] == ["a"]
    queue.release("a")
    assert [name for name, *_ in step(queue)] == ["b"]


def test_integrity_check_reports_a_leak() -> None:
    queue = scheduler()
    queue.pool.take(1)
    with pytest.raises(PageIntegrityError):
        queue.check_integrity()


@pytest.mark.parametrize("limits", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_limits_below_one_are_refused(limits: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        scheduler(step_tokens=limits[0], max_running=limits[1], max_waiting=limits[2])
