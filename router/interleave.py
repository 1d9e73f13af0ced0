"""Several streams as one, whose items come as soon as any of them has one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Ready: TypeAlias = asyncio.Queue[tuple[int, T] | Exception | None]  # an item, a stream's error, or its end


async def interleave(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[tuple[int, T]]:
    """Items of all ``streams`` with the stream's index, each stream's in its order; ends when all have ended.

    A stream runs ahead of the reader by one item at most. Its error ends all of them and is raised here. Closing this
    generator closes every stream.
    """
    if len(streams) == 1:  # most requests have one output: no task, no queue
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    ready: Ready[T] = asyncio.Queue(maxsize=1)
    tasks = [asyncio.create_task(_forward(index, stream, ready)) for index, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            match await ready.get():
                case None:
                    running -= 1
                case Exception() as error:
                    raise error
                case indexed:
                    yield indexed
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(index: int, stream: AsyncGenerator[T], ready: Ready[T]) -> None:
    try:
        async with aclosing(stream) as items:
            async for item in items:
                await ready.put((index, item))
    except Exception as error:  # noqa: BLE001 - raised again to the reader
        await ready.put(error)
    else:
        await ready.put(None)
