"""What waits for one attempt: one by one as long as its reader keeps up, then as much as there is."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from baton.messages import Report, Tokens
from baton.request import TokenEvent
from router.peers import Peer
from router.run import BEHIND, Inbox, InOrder

HERE, THERE = cast(Peer, "here"), cast(Peer, "there")  # who sent a record; the inbox only tells them apart
REPORT = Report("request", {})


def tokens(start: int, count: int = 1) -> Tokens:
    return Tokens(tuple(TokenEvent("request", index, 100 + index) for index in range(start, start + count)))


def drained(*records: tuple[Peer, object]) -> list[tuple[Peer, object]]:
    async def drain() -> list[tuple[Peer, object]]:
        inbox, got = Inbox(), []
        for record in (*records, None):
            inbox.put(record)
        while (record := await inbox.get()) is not None:
            got.append(record)
        return got

    return asyncio.run(drain())


def test_whoever_keeps_up_gets_every_record_as_it_came() -> None:
    records = [(HERE, tokens(index)) for index in range(BEHIND - 1)]  # and the end behind them
    assert drained(*records) == records


def test_whoever_is_behind_gets_all_tokens_at_once() -> None:
    records = [(HERE, tokens(2 * index, 2)) for index in range(BEHIND + 4)]
    assert drained(*records) == [(HERE, tokens(0, 2 * (BEHIND + 4)))]


def test_other_records_and_other_workers_keep_their_place() -> None:
    before, after = [(HERE, tokens(index)) for index in range(3)], [(THERE, tokens(index)) for index in range(3, 9)]
    assert drained(*before, (HERE, REPORT), *after) == [(HERE, tokens(0, 3)), (HERE, REPORT), (THERE, tokens(3, 6))]


def test_a_reader_waits_for_the_first_record_and_another_may_follow_it() -> None:
    async def read() -> tuple[Peer, object] | None:
        inbox = Inbox()
        given_up = asyncio.create_task(inbox.get())
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        reader = asyncio.create_task(inbox.get())
        await asyncio.sleep(0)
        assert not reader.done()
        inbox.put((HERE, REPORT))
        inbox.put((HERE, tokens(0)))
        return await asyncio.wait_for(reader, 5.0)

    assert asyncio.run(read()) == (HERE, REPORT)


def test_tokens_of_two_connections_come_out_in_order() -> None:
    merge = InOrder(4)
    assert merge.push(tokens(5).events) == ()
    assert merge.push(tokens(7).events) == ()
    assert merge.push(tokens(4).events) == tokens(4, 2).events
    assert merge.push(tokens(6, 1).events) == tokens(6, 2).events
    assert merge.push(tokens(8, 2).events) == tokens(8, 2).events
