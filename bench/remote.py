"""An object in a process of its own, so that a bench can pin, stop and kill it as a worker would be.

Processes are forked from a server that has torch loaded: a killed one is replaced within a tenth of a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

log = logging.getLogger(__name__)

PRELOAD = ("torch", "kvtransfer.sender", "kvtransfer.receiver", "bench.ends")
START_S = 60.0
_CLONE_NEWNET = 0x40000000


class Died(Exception):
    """The process ended before it answered."""


class RemoteError(Exception):
    """The method raised; the text says what."""


class Remote:
    """Calls ``async`` methods of the object that ``make`` returns in a new process. Use ``with``, or ``end`` it."""

    def __init__(self, make: Callable[[], object], *, core: int | None = None, own_network: bool = False) -> None:
        """``core``: pins the process. ``own_network``: it gets an empty network namespace; needs root over this one."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, make, core, own_network), daemon=True)
        self._process.start()
        theirs.close()
        if not self._connection.poll(START_S) or self._connection.recv() != "ready":
            raise Died("the process did not start")
        self._number = 0
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._dead = False
        self._reader = threading.Thread(target=self._read, name="remote", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def start(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """The answer, later: :class:`RemoteError` if the method raises, :class:`Died` if the process does."""
        answer: Future[Any] = Future()
        with self._lock:
            self._number += 1
            if self._dead:
                answer.set_exception(Died(method))
                return answer
            self._waiting[self._number] = answer
            with contextlib.suppress(OSError):  # the reader finds out and fails the answer
                self._connection.send((self._number, method, args, kwargs))
        return answer

    def call(self, method: str, *args: Any, timeout_s: float = 60.0, **kwargs: Any) -> Any:
        """Raises TimeoutError when there is no answer in time, and what :meth:`start` says."""
        return self.start(method, *args, **kwargs).result(timeout_s)

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.join(5)
        self._reader.join(5)
        self._connection.close()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                number, good, value = self._connection.recv()
                answer = self._waiting.pop(number)
                if good:
                    answer.set_result(value)
                else:
                    answer.set_exception(RemoteError(value))
        with self._lock:
            self._dead = True
            waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            answer.set_exception(Died("the process ended"))


def _main(connection: Connection, make: Callable[[], object], core: int | None, own_network: bool) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    if own_network and ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "no network namespace of its own")
    asyncio.run(_serve(connection, make()))


async def _serve(connection: Connection, target: object) -> None:
    """Answers every command from a task of its own, so that a waiting one holds up no other."""
    loop, commands, tasks = asyncio.get_running_loop(), asyncio.Queue[Any](), set()
    connection.send("ready")

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                loop.call_soon_threadsafe(commands.put_nowait, connection.recv())
        os._exit(0)  # the bench is gone

    threading.Thread(target=listen, daemon=True).start()
    while True:
        task = asyncio.create_task(_answer(connection, target, await commands.get()))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _answer(
    connection: Connection, target: object, command: tuple[int, str, tuple[Any, ...], dict[str, Any]]
) -> None:
    number, method, args, kwargs = command
    try:
        answer = (number, True, await getattr(target, method)(*args, **kwargs))
    except Exception as error:
        log.exception("%s failed", method)  # and the caller raises it
        answer = (number, False, f"{method}: {error!r}")
    connection.send(answer)
