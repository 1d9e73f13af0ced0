"""The thread that owns an engine: steps while there is work, runs what others ask between steps, sleeps otherwise."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from baton.errors import Overloaded, Unavailable
from baton.request import TokenEvent
from engine.engine import Engine
from engine.threads import compute_here, give_way

T = TypeVar("T")
log = logging.getLogger(__name__)

MAX_CALLS = 8192  # far above what one worker's requests, cancels and reports put in flight between two steps
QUIET_S = 0.1  # without a call, before pages are checked: milliseconds for tens of thousands of them
IDLE_WAIT_S = 5.0  # how long one sleep lasts; a call ends it at once
BLOCKED_WAIT_S = 0.05  # when work waits for pages that only a call can free


class EngineLoop:
    """Runs ``engine`` on a thread of its own. ``on_events`` and ``on_failure`` are called on that thread.

    When a step or ``on_events`` raises, ``on_failure`` is told once and the thread ends: the engine's state is unknown
    then, so the process is to be replaced.
    """

    def __init__(
        self,
        engine: Engine,
        on_events: Callable[[list[TokenEvent]], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._engine, self._on_events, self._on_failure = engine, on_events, on_failure
        self._calls: queue.Queue[Callable[[], None]] = queue.Queue()
        self._gate = threading.Lock()  # between "is it still open" and "put a call in"
        self._open = True
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call(self, fn: Callable[[Engine], T], *, bounded: bool = True) -> Future[T]:
        """``fn(engine)`` between two steps. The future raises what ``fn`` raises; Unavailable once the loop ended.

        bounded: Overloaded when too many wait. A release, of which there is one a sequence, must never be refused.
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if not self._open:
                future.set_exception(Unavailable("the engine has stopped"))
                return
            try:
                future.set_result(fn(self._engine))
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the future
                future.set_exception(error)

        with self._gate:
            if not self._open:
                run()
                return future
            if bounded and self._calls.qsize() >= MAX_CALLS:
                future.set_exception(Overloaded("too many calls wait for the engine", retry_after_ms=100))
            else:
                self._calls.put(run)
        return future

    def stop(self, timeout_s: float) -> bool:
        """Ends the thread after its current step; True when it has ended. Calls that still wait become Unavailable."""
        self._stopping.set()
        self.call(lambda engine: None, bounded=False)  # wakes it
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            give_way()
            compute_here(self._engine.threads)
            self._serve()
        except BaseException as error:  # the thread's outer boundary
            log.exception("the engine failed")
            self._close()
            self._on_failure(error)
            return
        self._close()

    def _serve(self) -> None:
        while not self._stopping.is_set():
            self._drain()
            if not self._engine.has_work:
                self._rest()
                continue
            events = self._engine.step()
            if events:
                self._on_events(events)
            elif self._engine.blocked:
                self._wait(BLOCKED_WAIT_S)

    def _rest(self) -> None:
        """Sleeps until a call comes, or for a while. Pages that changed hands are checked, but no request waits for it
        that comes right after the one before."""
        if self._engine.unchecked:
            if self._wait(QUIET_S):
                return
            self._engine.check_integrity()
        self._wait(IDLE_WAIT_S)

    def _drain(self) -> None:
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                return
            call()

    def _wait(self, timeout_s: float) -> bool:
        """True when a call came, which has run."""
        try:
            call = self._calls.get(timeout=timeout_s)
        except queue.Empty:
            return False
        call()
        return True

    def _close(self) -> None:
        with self._gate:
            self._open = False
        self._drain()
