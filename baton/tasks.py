"""The tasks a worker runs for its routers, one per request, owned by the connection it came on; work off the loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Hashable
from concurrent.futures import Future
from contextvars import copy_context
from typing import Generic, TypeVar

from baton import logs
from baton.errors import ProtocolError

T = TypeVar("T")
Owner = TypeVar("Owner", bound=Hashable)
log = logging.getLogger(__name__)


async def on_own_thread(call: Callable[[], T]) -> T:
    """What ``call()`` returns or raises, on a thread that is gone afterwards.

    For whatever computes with torch before the engine does. OpenMP counts the helpers of every thread that ever used
    it, as long as that thread lives; with more of them than cores nobody spins between two kernels any more, and a
    decode step takes twice as long. The threads of asyncio.to_thread live on.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the future
            future.set_exception(error)

    threading.Thread(target=run, name=getattr(call, "__name__", "work"), daemon=True).start()
    return await asyncio.wrap_future(future)


class Jobs(Generic[Owner]):
    """Tasks keyed by (owner, request id); an owner that goes away takes its tasks with it."""

    def __init__(self, broke: Callable[[Owner, str], None]) -> None:
        """``broke(owner, request id)`` is called when a task died of an error that it did not answer itself."""
        self._broke = broke
        self._tasks: dict[Owner, dict[str, asyncio.Task[None]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._tasks.values()))

    def start(self, owner: Owner, request_id: str, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Runs ``work()`` until it ends or is cancelled. Errors that it lets out are logged and ``broke``."""
        tasks = self._tasks.setdefault(owner, {})
        if request_id in tasks:
            raise ProtocolError(f"request id {request_id} is in use on this connection")
        context = copy_context()
        context.run(logs.about, request_id=request_id)
        task = asyncio.create_task(work(), name=request_id, context=context)
        tasks[request_id] = task
        begun_s = time.monotonic()
        task.add_done_callback(lambda done: self._ended(owner, request_id, done, begun_s), context=context)

    def cancel(self, owner: Owner, request_id: str) -> None:
        task = self._tasks.get(owner, {}).get(request_id)
        if task is not None:
            task.cancel()

    def cancel_all(self, owner: Owner) -> None:
        for task in list(self._tasks.get(owner, {}).values()):
            task.cancel()

    async def close(self, timeout_s: float = 5.0) -> None:
        """Cancels everything and waits for it, at most ``timeout_s``."""
        tasks = self._all()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)

    async def idle(self, timeout_s: float) -> bool:
        """Waits until nothing runs, at most ``timeout_s``: whether that came about."""
        deadline_s = time.monotonic() + timeout_s
        while (tasks := self._all()) and (left_s := deadline_s - time.monotonic()) > 0:
            await asyncio.wait(tasks, timeout=left_s)
        return not tasks

    def _all(self) -> list[asyncio.Task[None]]:
        return [task for owned in self._tasks.values() for task in owned.values()]

    def _ended(self, owner: Owner, request_id: str, task: asyncio.Task[None], begun_s: float) -> None:
        tasks = self._tasks.get(owner, {})
        if tasks.get(request_id) is task:
            del tasks[request_id]
        if not tasks:
            self._tasks.pop(owner, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("request %s: %r", request_id, error, exc_info=error)
            self._broke(owner, request_id)
        else:
            how = "cancelled" if task.cancelled() else "over"
            log.info("part of a request %s", how, extra={"seconds": round(time.monotonic() - begun_s, 4)})
