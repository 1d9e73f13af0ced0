"""The prefix cache through the scheduler: what is shared, copied, announced, published and evicted, and what is not."""

from __future__ import annotations

import pytest

from engine.pages import PageIntegrityError, PagePool
from engine.prefix import PrefixCache, chain
from engine.scheduler import Scheduler
from engine.sequence import Job, Slice


def keys(text: str, page_tokens: int = 4) -> tuple[str, ...]:
    """Names of the full pages of a prompt whose tokens are letters."""
    return tuple(text[:end] for end in range(page_tokens, len(text) + 1, page_tokens))


def job(name: str, text: str, outputs: int = 5, *, prefill_only: bool = False, priority: int = 0) -> Job:
    return Job(name, len(text), outputs, priority, prefill_only, keys(text))


def scheduler(pages: int = 16, step_tokens: int = 64, max_running: int = 8) -> Scheduler:
    return Scheduler(PagePool(pages, 4), step_tokens=step_tokens, max_running=max_running, max_waiting=8)


def step(queue: Scheduler) -> tuple[Slice, ...]:
    slices = queue.schedule(0.0)
    queue.advance(slices, 0.0)
    queue.check_integrity()
    return slices


def serve(queue: Scheduler, work: Job) -> Slice:
    """Computes the prompt in one step and forgets the sequence; what was computed."""
    queue.add(work, 0.0)
    [part] = step(queue)
    assert queue.release(work.request_id)
    queue.check_integrity()
    return part


def test_a_key_names_a_page_and_all_before_it() -> None:
    first = chain(b"salt", (1, 2))
    assert first == chain(b"salt", [1, 2])
    others = {chain(b"salt", (2, 1)), chain(b"pepper", (1, 2)), chain(b"salt", (1, 2, 0)), chain(first, (1, 2))}
    assert len(others | {first}) == 5
    assert {len(key) for key in others} == {16}


def test_what_was_computed_before_is_not_computed_again() -> None:
    queue = scheduler()
    first = serve(queue, job("a", "aaaabbbbcc"))
    assert (first.start, first.count, queue.pool.used, queue.pool.kept) == (0, 10, 0, 2)
    second = serve(queue, job("b", "aaaabbbbdd"))
    assert (second.start, second.count, second.cached, second.copy) == (8, 2, 8, None)
    assert second.pages[:2] == first.pages[:2]
    third = serve(queue, job("c", "aaaaccccdd"))
    assert (third.start, third.pages[0]) == (4, first.pages[0])
    assert serve(queue, job("d", "bbbb")).start == 0  # the same tokens elsewhere are something else
    assert (queue.holdings.entered_tokens, queue.holdings.hit_tokens) == (34, 12)


def test_without_keys_nothing_is_cached() -> None:
    queue = scheduler()
    for name in "ab":
        assert serve(queue, Job(name, 8, 1)).start == 0
    assert queue.pool.kept == 0


def test_running_sequences_share_what_they_have_in_common() -> None:
    queue = scheduler(pages=5)
    queue.add(job("a", "aaaabbbbc"), 0.0)
    step(queue)
    queue.add(job("b", "aaaabbbbd"), 0.0)
    a, b = step(queue)
    assert a.pages[:2] == b.pages[:2]
    assert queue.pool.used == 4
    queue.release("a")
    queue.check_integrity()
    assert queue.pool.used == 3


def test_a_wholly_cached_prompt_copies_its_last_page_and_computes_one_token() -> None:
    queue = scheduler()
    [source] = serve(queue, job("a", "aaaa")).pages
    queue.add(job("b", "aaaa"), 0.0)
    [part] = queue.schedule(0.0)
    [target] = part.pages
    assert (part.start, part.count, part.cached, part.samples) == (3, 1, 3, True)
    assert part.copy == (source, target)
    assert source != target
    queue.advance((part,), 0.0)
    queue.check_integrity()
    [decode] = queue.schedule(0.0)
    assert decode.pages[0] == source  # the copy has served: the original holds the same
    assert decode.copy is None
    assert queue.pool.used == 2


def test_where_there_is_no_page_for_a_copy_the_original_is_taken() -> None:
    queue = scheduler(pages=2)
    pages = serve(queue, job("a", "aaaabbbb", 1)).pages
    queue.add(job("b", "aaaabbbb", 1), 0.0)
    [part] = step(queue)
    assert (part.start, part.count, part.copy, set(part.pages)) == (7, 1, None, set(pages))
    assert queue.pool.kept == 2


def test_chunks_of_a_handoff_join_up_to_the_prompt_though_part_of_it_was_cached() -> None:
    queue = scheduler(step_tokens=4)
    serve(queue, job("a", "aaaa"))
    queue.add(job("b", "aaaabbbbccd", prefill_only=True), 0.0)
    assert [(p.start - p.cached, p.start + p.count) for p in step(queue) + step(queue)] == [(0, 8), (8, 11)]


def test_pages_that_come_into_the_cache_meanwhile_are_adopted() -> None:
    queue = scheduler(step_tokens=4, max_running=2)
    text = "aaaabbbbccccd"
    queue.add(Job("slow", 13, 5, -1, True, keys(text)), 0.0)
    assert [(p.request_id, p.start, p.count) for p in step(queue)] == [("slow", 0, 4)]
    queue.add(job("fast", "aaaabbbbccccx"), 0.0)
    computed = [(p.request_id, p.start, p.count, p.cached) for _ in range(4) for p in step(queue)]
    assert computed[:3] == [("fast", 4, 4, 4), ("fast", 8, 4, 0), ("fast", 12, 1, 0)]
    assert ("slow", 12, 1, 8) in computed
    assert queue.pool.used == 5


def test_a_page_computed_twice_in_one_step_is_kept_once() -> None:
    queue = scheduler()
    queue.add(job("a", "aaaab"), 0.0)
    queue.add(job("b", "aaaac"), 0.0)
    queue.add(job("c", "aaaad", prefill_only=True), 0.0)
    first, second, third = step(queue)
    assert len({first.pages[0], second.pages[0], third.pages[0]}) == 3
    decodes = {part.request_id: part for part in step(queue)}
    assert decodes["b"].pages[0] == decodes["a"].pages[0]
    assert queue.pool.used == 5  # what is read for a handoff stays where it is, unshared
    queue.release("c")
    queue.check_integrity()
    assert queue.pool.kept == 1


def test_output_tokens_are_cached_under_the_names_they_are_given() -> None:
    queue = scheduler()
    queue.add(job("a", "aaa"), 0.0)
    step(queue)
    queue.identify("a", "aaab")
    step(queue)
    assert queue.pool.kept == 1
    queue.release("a")
    assert serve(queue, job("b", "aaabc")).start == 4


def test_a_preempted_sequence_finds_again_what_nobody_needed_meanwhile() -> None:
    queue = scheduler(pages=4, max_running=1)
    queue.add(job("minor", "aaaabbbbc"), 0.0)
    step(queue)
    queue.add(job("major", "x", 1, priority=1), 0.0)
    [part] = step(queue)
    assert (part.request_id, queue.preemptions) == ("major", 1)
    queue.release("major")
    [part] = step(queue)
    assert (part.request_id, part.start, part.count, part.decode) == ("minor", 8, 2, False)


def test_a_sequence_that_finds_all_but_its_newest_token_comes_back_as_a_decode() -> None:
    queue = scheduler(max_running=1)
    queue.add(job("minor", "aaab", 9), 0.0)
    step(queue)  # the page is full, and the newest token comes after it
    queue.add(job("major", "x", 1, priority=1), 0.0)
    assert [part.request_id for part in step(queue)] == ["major"]
    queue.release("major")
    assert [(part.start, part.count, part.decode) for part in step(queue)] == [(4, 1, True)]


def test_reserved_pages_enter_the_cache_only_with_exact_kv() -> None:
    queue = scheduler()
    for name, exact in (("lossy", False), ("exact", True)):
        queue.reserve(job(name, "aaaabbbbc"), 0.0)
        assert queue.pool.kept == 0
        queue.start(name, exact=exact)
        step(queue)
        queue.release(name)
    assert queue.pool.kept == 2
    assert serve(queue, job("b", "aaaabbbbd")).start == 8


def test_what_was_never_computed_is_never_found() -> None:
    queue = scheduler(step_tokens=6)
    queue.add(job("a", "aaaabbbbcc"), 0.0)
    step(queue)
    queue.release("a")
    queue.reserve(job("b", "bbbbb"), 0.0)
    queue.release("b")
    assert queue.pool.kept == 1
    assert serve(queue, job("c", "aaaabbbbdd")).start == 4
    assert serve(queue, job("d", "bbbbc")).start == 0


def test_the_least_recently_used_leaf_makes_room() -> None:
    queue = scheduler(pages=4)
    serve(queue, job("a", "aaaabbbb", 1))
    serve(queue, job("b", "xxxx", 1))
    serve(queue, job("c", "aaaac", 1))  # uses the first page again
    serve(queue, job("d", "yyyyzz", 1))  # one page is free, one must go
    assert queue.pool.kept == 3
    cached = [bool(queue.holdings.cache.match(keys(text), 9)) for text in ("aaaa", "xxxx", "yyyy")]
    assert cached == [True] * 3  # so it was bbbb, though aaaa is as old and xxxx a leaf as well
    serve(queue, job("e", "zzzzzz", 1))
    cached = [bool(queue.holdings.cache.match(keys(text), 9)) for text in ("aaaa", "xxxx", "yyyy")]
    assert cached == [True, False, True]


def test_integrity_finds_a_cache_that_forgot_or_mixed_up_a_page() -> None:
    pool = PagePool(3, 4)
    cache = PrefixCache(pool)
    pages = pool.take(3)
    cache.publish("a", pages[0], None)
    cache.publish("ab", pages[1], pages[0])
    assert (len(cache), cache.match(["a", "ab", "abc"], 5), cache.match(["a", "ab"], 1)) == (2, pages[:2], pages[:1])
    cache.check_integrity([(["a"], pages[:1])])
    with pytest.raises(PageIntegrityError, match="cached already"):
        cache.publish("a", pages[2], None)
    with pytest.raises(PageIntegrityError, match="shared but not cached"):
        cache.check_integrity([(["b"], pages[:1])])
    pool.drop(pages[:1])  # the parent goes idle while its child is in use
    with pytest.raises(PageIntegrityError, match="evicted before"):
        cache.check_integrity([])
    pool.take(1)
    with pytest.raises(PageIntegrityError, match="outlived"):
        cache.check_integrity([])
    pool.keep(pages[2])
    with pytest.raises(PageIntegrityError, match="kept"):
        cache.check_integrity([])


def test_what_waits_counts_without_what_it_found_cached() -> None:
    queue = scheduler()
    serve(queue, job("a", "aaaabbbbcc"))
    queue.add(job("b", "aaaabbbbddddee"), 0.0)
    assert queue.waiting_tokens == 6
    queue.add(job("c", "aaaabbbb"), 0.0)
    assert queue.waiting_tokens == 7  # the last token of what is cached as a whole is computed for its logits
    queue.add(job("d", "xxxxbbbb"), 0.0)
    assert queue.waiting_tokens == 15
    step(queue)
    assert queue.waiting_tokens == 0
