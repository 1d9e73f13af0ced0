"""Stories over executors: each goes on by its own results, whoever is ahead."""

from __future__ import annotations

import threading
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import pytest

from placement.stories import Serial, Story, together


def squares(executor: Executor, first: int, seen: list[int]) -> Story:
    number = first
    for _ in range(3):
        asked = [executor.submit(pow, number, 2), executor.submit(pow, number + 1, 2)]
        yield asked
        number = sum(future.result() for future in asked) % 97
        seen.append(number)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_story_ends_alike_in_any_company(workers: int) -> None:
    executor: Executor = ThreadPoolExecutor(workers) if workers else Serial()
    with executor:
        alone, seen = list[int](), [list[int](), list[int]()]
        together([squares(executor, 3, alone)])
        together([squares(executor, 3, seen[0]), squares(executor, 5, seen[1])])
    assert seen[0] == alone
    assert len(seen[1]) == 3


def test_no_story_waits_for_another_ones_work() -> None:
    opened, ended = threading.Event(), threading.Event()

    def slow(executor: Executor) -> Story:
        yield [executor.submit(opened.wait, 20.0)]

    def quick(executor: Executor) -> Story:
        for _ in range(3):
            yield [executor.submit(int)]
        opened.set()  # the slow one's work can only end after this
        ended.set()

    with ThreadPoolExecutor(2) as executor:
        together([slow(executor), quick(executor)])
    assert ended.is_set()


def test_a_failure_is_raised_where_it_is_read() -> None:
    def story() -> Story:
        asked = Serial().submit(int, "x")
        yield [asked]
        asked.result()

    with pytest.raises(ValueError, match="invalid literal"):
        together([story()])


def test_what_others_wait_for_is_not_begun_after_a_failure() -> None:
    running, ended = threading.Event(), threading.Event()
    queued = list[Future[int]]()

    def first(executor: Executor) -> Story:
        yield [executor.submit(lambda: running.set() or ended.wait(20.0))]

    def second(executor: Executor) -> Story:
        running.wait(20.0)
        queued.append(executor.submit(int))
        yield queued

    def third() -> Story:
        yield []
        raise RuntimeError("interrupted")

    with ThreadPoolExecutor(1) as executor:
        with pytest.raises(RuntimeError, match="interrupted"):
            together([first(executor), second(executor), third()])
        ended.set()
    assert queued[0].cancelled()


def test_a_story_without_waits_and_none_at_all_end() -> None:
    def empty() -> Story:
        yield []

    together([])
    together([empty(), empty()])
