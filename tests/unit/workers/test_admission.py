"""The line before a decode worker's pages."""

from __future__ import annotations

import asyncio

import pytest

from baton.errors import Overloaded
from baton.request import Sampling, Work
from decode_worker.admission import Admission


def work(name: str, priority: int = 0) -> Work:
    return Work(name, (1,), Sampling(), priority, 10.0)


class Room:
    """A countable resource: an attempt takes one unit or is Overloaded."""

    def __init__(self, units: int) -> None:
        self.units, self.taken = units, list[str]()

    async def take(self, name: str) -> str:
        await asyncio.sleep(0)
        if not self.units:
            raise Overloaded("full")
        self.units -= 1
        self.taken.append(name)
        return name


async def test_room_at_once() -> None:
    admission, room = Admission(2, aging_s=60.0), Room(1)
    assert await admission.admit(work("a"), lambda: room.take("a")) == "a"
    assert len(admission) == 0


async def test_waits_in_order_of_priority_then_arrival() -> None:
    admission, room = Admission(8, aging_s=60.0), Room(0)
    waiting = [
        asyncio.create_task(admission.admit(work(name, priority), lambda name=name: room.take(name)))  # type: ignore[misc]
        for name, priority in [("first", 0), ("second", 0), ("urgent", 5)]
    ]
    await asyncio.sleep(0.01)
    assert len(admission) == 3
    for _ in waiting:
        room.units += 1
        admission.freed()
        await asyncio.sleep(0.01)
    await asyncio.gather(*waiting)
    assert room.taken == ["urgent", "first", "second"]


async def test_who_has_waited_long_enough_goes_before_a_higher_priority() -> None:
    admission, room = Admission(8, aging_s=0.01), Room(0)
    waiting = []
    for name, priority in [("old", 0), ("urgent", 2)]:
        waiting.append(asyncio.create_task(admission.admit(work(name, priority), lambda name=name: room.take(name))))  # type: ignore[misc]
        await asyncio.sleep(0.05)
    for _ in waiting:
        room.units += 1
        admission.freed()
        await asyncio.sleep(0.01)
    await asyncio.gather(*waiting)
    assert room.taken == ["old", "urgent"]


async def test_a_full_line_refuses_at_once_with_a_hint() -> None:
    admission, room = Admission(1, aging_s=60.0), Room(0)
    waiting = asyncio.create_task(admission.admit(work("a"), lambda: room.take("a")))
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded) as refused:
        await admission.admit(work("b"), lambda: room.take("b"))
    assert refused.value.retry_after_ms > 0
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert len(admission) == 0


async def test_a_cancelled_head_lets_the_next_try() -> None:
    admission, room = Admission(8, aging_s=60.0), Room(0)
    head = asyncio.create_task(admission.admit(work("head"), lambda: room.take("head")))
    await asyncio.sleep(0.01)
    follower = asyncio.create_task(admission.admit(work("next"), lambda: room.take("next")))
    await asyncio.sleep(0.01)
    room.units = 1
    head.cancel()
    assert await asyncio.wait_for(follower, 1.0) == "next"
    await asyncio.gather(head, return_exceptions=True)
    assert room.taken == ["next"]
