"""Tasks belong to the connection they came on, and end with it."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from baton.errors import ProtocolError
from baton.tasks import Jobs, on_own_thread


class Waiting:
    """Work that waits until it is let go, and notes how it ended."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.ended = ""

    async def __call__(self) -> None:
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise
        self.ended = "done"


def unexpected(owner: str, request_id: str) -> None:
    raise AssertionError(f"{request_id} of {owner} broke")


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_finished_task_is_forgotten() -> None:
    jobs, work = Jobs(unexpected), Waiting()
    jobs.start("a", "1", work)
    assert len(jobs) == 1
    work.go.set()
    await settle()
    assert work.ended == "done"
    assert len(jobs) == 0


async def test_cancel_ends_one_request_of_one_owner() -> None:
    jobs, first, other, elsewhere = Jobs(unexpected), Waiting(), Waiting(), Waiting()
    jobs.start("a", "1", first)
    jobs.start("a", "2", other)
    jobs.start("b", "1", elsewhere)  # two routers may use the same id
    await settle()
    jobs.cancel("a", "1")
    jobs.cancel("a", "unknown")
    jobs.cancel("unknown", "1")
    await settle()
    assert (first.ended, other.ended, elsewhere.ended) == ("cancelled", "", "")
    assert len(jobs) == 2
    await jobs.close()


async def test_an_owner_that_goes_takes_its_tasks_along() -> None:
    jobs, works, elsewhere = Jobs(unexpected), [Waiting() for _ in range(5)], Waiting()
    for index, work in enumerate(works):
        jobs.start("a", str(index), work)
    jobs.start("b", "0", elsewhere)
    await settle()
    jobs.cancel_all("a")
    jobs.cancel_all("unknown")
    await settle()
    assert {work.ended for work in works} == {"cancelled"}
    assert elsewhere.ended == ""
    assert len(jobs) == 1
    await jobs.close()
    assert elsewhere.ended == "cancelled"
    assert len(jobs) == 0


async def test_an_id_in_use_is_refused_and_the_first_goes_on() -> None:
    jobs, first, second = Jobs(unexpected), Waiting(), Waiting()
    jobs.start("a", "1", first)
    with pytest.raises(ProtocolError, match="in use"):
        jobs.start("a", "1", second)
    first.go.set()
    await settle()
    assert first.ended == "done"
    jobs.start("a", "1", second)  # free again
    await jobs.close()


async def test_close_does_not_wait_for_ever() -> None:
    jobs, released = Jobs(unexpected), asyncio.Event()

    async def stubborn() -> None:
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue

    jobs.start("a", "1", stubborn)
    await settle()
    async with asyncio.timeout(2.0):
        await jobs.close(timeout_s=0.05)
    released.set()
    await settle()


async def test_an_error_nobody_answered_is_logged_and_told(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> None:
        raise RuntimeError("lost my way")

    told: list[tuple[str, str]] = []
    jobs = Jobs[str](lambda owner, request_id: told.append((owner, request_id)))
    with caplog.at_level(logging.ERROR):
        jobs.start("a", "request-7", broken)
        await settle()
    assert "request-7" in caplog.text
    assert "lost my way" in caplog.text
    assert told == [("a", "request-7")]
    assert len(jobs) == 0


async def test_work_off_the_loop_leaves_no_thread_behind() -> None:
    seen: list[threading.Thread] = []

    def work() -> int:
        seen.append(threading.current_thread())
        return 7

    assert await on_own_thread(work) == 7
    seen[0].join(1.0)
    assert seen[0] is not threading.main_thread()
    assert not seen[0].is_alive()


async def test_an_error_off_the_loop_reaches_who_waits() -> None:
    def work() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await on_own_thread(work)
