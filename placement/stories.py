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
    """Runs every story to its end, each as soon as what it waits for is there. Raises what a story raises."""
    waiting: dict[Story, Collection[Future[Any]]] = dict.fromkeys(stories, ())
    while waiting:
        for story in [story for story, futures in waiting.items() if all(future.done() for future in futures)]:
            try:
                waiting[story] = next(story)
            except StopIteration:
                del waiting[story]
        pending = [future for futures in waiting.values() for future in futures if not future.done()]
        if pending and all(any(not future.done() for future in futures) for futures in waiting.values()):
            wait(pending, return_when=FIRST_COMPLETED)
