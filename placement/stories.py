"""Work for several processes at once, told as stories that wait for it.

A story is a generator: it submits work to an executor, yields the futures that it must have before it can go on, and is
resumed when these are there. What a story does depends on its own results alone, so that it ends as it would in any
other company; which of several stories is ahead depends on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from typing import Any, ParamSpec, TypeAlias, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Story: TypeAlias = Generator[Collection[Future[Any]], None, None]


class Serial(Executor):
    """Does everything at once in this process, when it is submitted."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - it belongs to whoever reads the future
            future.set_exception(error)
        return future


SERIAL = Serial()


def together(stories: Iterable[Story]) -> None:
    """Runs every story to its end, each as soon as what it waits for is there.

    Raises what a story raises; what others wait for then is not begun any more.
    """
    waiting: dict[Story, Collection[Future[Any]]] = dict.fromkeys(stories, ())
    try:
        while waiting:
            for story in [story for story, futures in waiting.items() if all(map(Future.done, futures))]:
                try:
                    waiting[story] = next(story)
                except StopIteration:
                    del waiting[story]
            if not any(all(map(Future.done, futures)) for futures in waiting.values()):
                wait([f for futures in waiting.values() for f in futures if not f.done()], return_when=FIRST_COMPLETED)
    finally:
        for futures in waiting.values():
            for future in futures:
                future.cancel()
