"""The engine's thread: calls, events, failure, stop."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

import pytest

from baton.errors import InvalidRequest, Overloaded, Unavailable
from baton.request import TokenEvent
from engine import loop as loop_module
from engine.engine import Engine
from engine.loop import EngineLoop
from engine.model import Model

if TYPE_CHECKING:
    from tests.unit.engine.conftest import Harness

WAIT_S = 20.0


class Listener:
    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self.failures: list[BaseException] = []
        self.finished = threading.Event()
        self.failed = threading.Event()

    def on_events(self, events: list[TokenEvent]) -> None:
        self.events += events
        if any(event.finish for event in events):
            self.finished.set()

    def on_failure(self, error: BaseException) -> None:
        self.failures.append(error)
        self.failed.set()


def test_runs_what_is_added_and_stops(tiny: Model, harness: Harness) -> None:
    listener, engine = Listener(), harness.engine(tiny)
    loop = EngineLoop(engine, listener.on_events, listener.on_failure)
    loop.start()
    work = harness.work("a", harness.prompt(9))
    loop.call(lambda engine: engine.add(work)).result(WAIT_S)
    assert listener.finished.wait(WAIT_S)
    assert harness.tokens(listener.events) == harness.alone(tiny, work)
    assert loop.call(lambda engine: engine.load().pages_used).result(WAIT_S) == 0
    assert loop.stop(WAIT_S)
    with pytest.raises(Unavailable, match="stopped"):
        loop.call(lambda engine: engine.load()).result(WAIT_S)
    assert listener.failures == []


def test_a_calls_error_is_the_callers(tiny: Model, harness: Harness) -> None:
    listener = Listener()
    loop = EngineLoop(harness.engine(tiny), listener.on_events, listener.on_failure)
    loop.start()
    with pytest.raises(InvalidRequest):
        loop.call(lambda engine: engine.add(harness.work("a", []))).result(WAIT_S)
    assert loop.call(lambda engine: engine.has_work).result(WAIT_S) is False
    assert loop.stop(WAIT_S)
    assert listener.failures == []


def test_a_failing_step_is_told_once_and_ends_the_thread(tiny: Model, harness: Harness) -> None:
    class Broken:
        def layer_written(self, layer: int, chunks: object) -> None:
            raise RuntimeError("no staging left")

    listener = Listener()
    loop = EngineLoop(harness.engine(tiny, observer=Broken()), listener.on_events, listener.on_failure)
    loop.start()
    loop.call(lambda engine: engine.add(harness.work("a", harness.prompt(9)), prefill_only=True)).result(WAIT_S)
    assert listener.failed.wait(WAIT_S)
    assert [str(error) for error in listener.failures] == ["no staging left"]
    with pytest.raises(Unavailable):
        loop.call(lambda engine: engine.load()).result(WAIT_S)
    assert loop.stop(WAIT_S)


def test_a_leaked_page_is_a_failure_when_idle(tiny: Model, harness: Harness) -> None:
    listener, engine = Listener(), harness.engine(tiny)
    loop = EngineLoop(engine, listener.on_events, listener.on_failure)
    loop.start()

    def leak(engine: Engine) -> None:
        engine._pool.take(1)
        engine.add(harness.work("a", harness.prompt(9)))

    loop.call(leak).result(WAIT_S)
    assert listener.failed.wait(WAIT_S)
    assert "0 owners" in str(listener.failures[0])


def test_pages_are_checked_once_after_each_change(
    tiny: Model, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "QUIET_S", 0.01)
    listener, engine, checks = Listener(), harness.engine(tiny), threading.Semaphore(0)
    check = engine.check_integrity

    def counted() -> None:
        check()
        checks.release()

    monkeypatch.setattr(engine, "check_integrity", counted)
    loop = EngineLoop(engine, listener.on_events, listener.on_failure)
    loop.start()
    for _ in range(3):
        loop.call(lambda engine: engine.load()).result(WAIT_S)
    assert not checks.acquire(timeout=0.2)  # nothing has changed hands
    loop.call(lambda engine: engine.reserve(harness.work("landing", harness.prompt(9)))).result(WAIT_S)
    assert checks.acquire(timeout=WAIT_S)
    for _ in range(3):
        loop.call(lambda engine: engine.load()).result(WAIT_S)
    assert not checks.acquire(timeout=0.2)
    loop.call(lambda engine: engine.release("landing")).result(WAIT_S)
    assert checks.acquire(timeout=WAIT_S)
    loop.call(lambda engine: engine.add(harness.work("a", harness.prompt(9)))).result(WAIT_S)
    assert listener.finished.wait(WAIT_S)
    assert checks.acquire(timeout=WAIT_S)
    assert loop.stop(WAIT_S)
    assert listener.failures == []


def test_work_that_waits_for_pages_goes_on_after_a_release(tiny: Model, harness: Harness) -> None:
    listener, engine = Listener(), harness.engine(tiny, pages=5)
    loop = EngineLoop(engine, listener.on_events, listener.on_failure)
    engine.reserve(harness.work("landing", harness.prompt(9)))
    engine.add(harness.work("a", harness.prompt(9)))
    loop.start()
    assert not listener.finished.wait(0.2)
    loop.call(lambda engine: engine.release("landing")).result(WAIT_S)
    assert listener.finished.wait(WAIT_S)
    assert loop.stop(WAIT_S)


def test_calls_are_bounded_and_can_be_cancelled(tiny: Model, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "MAX_CALLS", 2)
    listener = Listener()
    loop = EngineLoop(harness.engine(tiny), listener.on_events, listener.on_failure)
    first, second = (loop.call(lambda engine: engine.has_work) for _ in range(2))
    with pytest.raises(Overloaded):
        loop.call(lambda engine: engine.has_work).result(WAIT_S)
    assert first.cancel()
    loop.start()
    assert second.result(WAIT_S) is False
    with pytest.raises(CancelledError):
        first.result(WAIT_S)
    assert loop.stop(WAIT_S)
