"""Two workers in two real processes, forked from one that has torch loaded, so that a kill costs no second import."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PEER = Path(__file__).with_name("peer.py")
LAYOUT = {"model": "m", "layers": 4, "kv_heads": 2, "head_dim": 32, "dtype": "float32"}
TRANSPORTS = ("tcp", "nixl", "nixl-over-tcp")
Answer = Any


class Worker:
    """A peer process. ``call`` waits for the answer; ``start`` does not, ``answer`` then does."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["kvtransfer.sender", "kvtransfer.receiver"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=runpy.run_path, args=(str(PEER),), kwargs={"init_globals": {"connection": theirs}}, daemon=True
        )
        self._process.start()
        theirs.close()
        self._number = 0
        self._answers: dict[int, tuple[bool, Answer]] = {}

    def start(self, method: str, *args: Any, **kwargs: Any) -> int:
        self._number += 1
        self._pipe.send((self._number, method, args, kwargs))
        return self._number

    def answer(self, number: int, *, timeout_s: float = 20.0) -> Answer:
        deadline = time.monotonic() + timeout_s
        while number not in self._answers:
            assert self._pipe.poll(max(0.0, deadline - time.monotonic())), f"no answer within {timeout_s} s"
            answered, good, value = self._pipe.recv()
            self._answers[answered] = (good, value)
        good, value = self._answers.pop(number)
        if not good:
            raise RuntimeError(value)
        return value

    def call(self, method: str, *args: Any, **kwargs: Any) -> Answer:
        return self.answer(self.start(method, *args, **kwargs))

    def has_answered(self, number: int) -> bool:
        while self._pipe.poll(0):
            answered, good, value = self._pipe.recv()
            self._answers[answered] = (good, value)
        return number in self._answers

    def signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # a test may have killed it already
            self.signal(signal.SIGKILL)
        self._process.join(5)
        self._pipe.close()


@dataclass
class Pair:
    """A prefill and a decode worker; with the loopback transport they are one process."""

    transport: str
    prefill: Worker
    decode: Worker
    layout: dict[str, Any] = field(default_factory=lambda: dict(LAYOUT))

    def config(self, **changes: Any) -> dict[str, Any]:
        name, over_tcp = self.transport.partition("-")[0], self.transport.endswith("over-tcp")
        base = {
            "transport": name, "ucx_tls": "tcp" if over_tcp else "", "stall_s": 1.0, "lease_s": 2.0,
            "landing_bytes": 8 << 20, "staging_bytes": 8 << 20,
        }  # fmt: skip
        return base | changes

    def begin(self, **changes: Any) -> None:
        self.decode.call("start_receiver", self.layout, self.config(**changes))
        self.prefill.call("start_sender", self.layout, self.config(**changes))

    def hand_over(self, request_id: str, *, tokens: int = 150, codec: str = "raw", seed: int = 3) -> Answer:
        """One whole handoff; the receiver's outcome."""
        ticket = self.decode.call("reserve", request_id, tokens=tokens, codec=codec)
        self.prefill.call("send", ticket, seed, tokens=tokens)
        outcome = self.decode.call("received", request_id)
        self.decode.call("release", request_id)
        return outcome

    def idle(self, timeout_s: float = 3.0) -> None:
        """Both sides hold nothing, within ``timeout_s``."""
        self.until(lambda: self.decode_held() == (0, 0, 0) and self.prefill_held() == (0, 0), timeout_s)

    def decode_held(self) -> tuple[int, int, int]:
        stats = self.decode.call("receiver_stats")
        return stats.leases, stats.landing_bytes_used, stats.quarantined_bytes

    def prefill_held(self) -> tuple[int, int]:
        stats = self.prefill.call("sender_stats")
        return stats.handoffs, stats.staging_bytes_used

    @staticmethod
    def until(condition: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s"
            time.sleep(0.01)


def _begun(transport: str, **changes: Any) -> Iterator[Pair]:
    decode = Worker()
    prefill = decode if transport == "loopback" else Worker()
    pair = Pair(transport, prefill, decode)
    try:
        pair.begin(**changes)
        yield pair
    finally:
        prefill.end()
        decode.end()


@pytest.fixture(scope="module", params=("loopback", *TRANSPORTS))
def standing(request: pytest.FixtureRequest) -> Iterator[Pair]:
    yield from _begun(request.param, landing_bytes=160 << 20)


@pytest.fixture
def pair(standing: Pair) -> Iterator[Pair]:
    """Two workers that many tests share, so every test must leave them holding nothing."""
    yield standing
    standing.idle()


@pytest.fixture
def small_pair() -> Iterator[Pair]:
    """One process with room for two blocks on either side."""
    yield from _begun("loopback", landing_bytes=2400 << 10, staging_bytes=2400 << 10)


@pytest.fixture(params=TRANSPORTS)
def mortal_pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Two processes of one test, to be stopped and killed; the receiver has room for one block."""
    yield from _begun(request.param, landing_bytes=1200 << 10)
