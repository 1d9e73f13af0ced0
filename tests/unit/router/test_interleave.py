"""Several streams as one: order within each, errors, and that closing closes all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from router.interleave import interleave


class Source:
    """Streams that say when they are closed."""

    def __init__(self) -> None:
        self.open = 0

    async def count(self, items: int, pause_s: float = 0.0, error: Exception | None = None) -> AsyncGenerator[int]:
        self.open += 1
        try:
            for item in range(items):
                await asyncio.sleep(pause_s)
                yield item
            if error is not None:
                raise error
        finally:
            self.open -= 1


@pytest.mark.parametrize("streams", [1, 2, 5])
async def test_every_item_comes_in_its_streams_order(streams: int) -> None:
    source = Source()
    got = [pair async for pair in interleave([source.count(4) for _ in range(streams)])]
    for index in range(streams):
        assert [item for of, item in got if of == index] == [0, 1, 2, 3]
    assert source.open == 0


async def test_a_slow_stream_does_not_hold_up_a_fast_one() -> None:
    source = Source()
    got = [of async for of, _ in interleave([source.count(1, pause_s=0.2), source.count(20)])]
    assert got == [1] * 20 + [0]


@pytest.mark.parametrize("streams", [1, 3])
async def test_an_error_ends_all(streams: int) -> None:
    source = Source()
    others = [source.count(1000, pause_s=0.01) for _ in range(streams - 1)]
    with pytest.raises(ValueError, match="broken"):
        async for _ in interleave([source.count(2, error=ValueError("broken")), *others]):
            pass
    assert source.open == 0


@pytest.mark.parametrize("streams", [1, 3])
async def test_closing_closes_all(streams: int) -> None:
    source = Source()
    async with aclosing(interleave([source.count(1000) for _ in range(streams)])) as items:
        await anext(items)
        await asyncio.sleep(0.01)
        assert source.open == streams
    assert source.open == 0


async def test_a_stream_runs_ahead_by_one_item_at_most() -> None:
    made = []

    async def eager() -> AsyncGenerator[int]:
        for item in range(100):
            made.append(item)
            yield item

    async with aclosing(interleave([eager(), Source().count(1, pause_s=10.0)])) as items:
        await anext(items)
        await asyncio.sleep(0.02)
        assert len(made) <= 3  # one read, one ready, one waiting for its place
