"""Rank 0's hold on the other ranks of its tensor-parallel replica: it starts them, tells them each step, and learns of
their death.

    rank 0's process                          rank r's process (``engine.rank_process``)
    start ── Task ──────────────────────────> load its slice of the model
    await_ready <──────────────────── Ready ──
    send ── Step ───────────────────────────> run the same step over its own heads
            <═ sums of the step: engine.shared_reduce ═>
    close, or death ── end of file ─────────> end

The memory that they share has no name, the sockets are inherited and the ranks die with the thread that started them,
so nothing outlives rank 0, whatever kills it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.errors import ConfigError, Unavailable
from baton.layout import KVLayout
from baton.records import pack
from engine import hub, weights
from engine.channel import Channel, Ready, Task
from engine.comm import RankLost
from engine.runner import Step
from engine.shared_cache import Segment, SharedKVCache
from engine.shared_reduce import ROUND_TIMEOUT_S, SharedReduce, create_shared, map_shared
from engine.spec import ModelSpec

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 60.0
READY_TIMEOUT_S = 600.0  # reading a large model from a cold disk
END_TIMEOUT_S = 2.0  # a rank ends within a step; one that is stopped never does
WATCH_MS = 1000


@dataclass(frozen=True, slots=True)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    channel: Channel


class Ranks:
    """Ranks 1 to ``ranks - 1`` as processes, and what rank 0 shares with them. Close it, or end the process."""

    def __init__(
        self,
        folder: Path,
        *,
        ranks: int,
        dtype: str,
        threads: int,
        pages: int,
        page_tokens: int,
        round_timeout_s: float = ROUND_TIMEOUT_S,
    ) -> None:
        """Starts them. ``dtype`` as :func:`engine.weights.choose_dtype` takes it; ``threads`` of torch in each.

        Raises :class:`ConfigError` when the model cannot be shared among ``ranks``.
        """
        if torch.cuda.is_available():
            raise ConfigError("more than 1 is for CPU workers so far, this one has CUDA", field="tensor_parallel")
        spec = ModelSpec.from_folder(folder)
        require_divisible(spec, ranks)
        compute = weights.choose_dtype(dtype, torch.device("cpu"))
        layout = KVLayout(hub.describe(folder), spec.layers, spec.kv_heads, spec.head_dim, compute)
        segment = Segment(layout, ranks, pages, page_tokens)
        self._gate = threading.Lock()
        self._lost: RankLost | None = None
        self._on_lost: Callable[[RankLost], None] | None = None
        self._closing = threading.Event()
        descriptor = create_shared(segment.bytes)
        try:
            memory = map_shared(descriptor)
            tasks = [
                Task(rank, ranks, str(folder), compute, threads, pages, page_tokens, os.getpid())
                for rank in range(1, ranks)
            ]
            started: Future[list[_Rank]] = Future()
            self._watcher = threading.Thread(
                target=self._own, args=(tasks, descriptor, started), name="ranks", daemon=True
            )
            self._watcher.start()
            self._ranks = started.result(START_TIMEOUT_S)
        finally:
            os.close(descriptor)
        self.cache = SharedKVCache(segment, memory)
        self.comm = SharedReduce(memory, rank=0, ranks=ranks, check_peers=self.check, timeout_s=round_timeout_s)

    @property
    def pids(self) -> list[int]:
        """Processes of ranks 1, 2, ..."""
        return [rank.process.pid for rank in self._ranks]

    def await_ready(self) -> None:
        """Returns when every rank has loaded its slice. Raises :class:`Unavailable` when one does not."""
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        for rank in self._ranks:
            try:
                answer = rank.channel.receive(deadline_s - time.monotonic())
            except TimeoutError:
                raise RankLost(rank.number, f"not ready after {READY_TIMEOUT_S:g} s") from None
            if not isinstance(answer, Ready):
                raise RankLost(rank.number, "it ended while it loaded the model; its log says why")

    def send(self, step: Step) -> None:
        """Tells every other rank to run ``step``. Raises :class:`RankLost`."""
        self.check()
        body = pack(step)
        for rank in self._ranks:
            try:
                rank.channel.send_packed(body)
            except OSError as error:  # TimeoutError is one
                raise RankLost(rank.number, f"it does not take steps: {error}") from None

    def check(self) -> None:
        """Raises :class:`RankLost` when a rank is known to have died."""
        if self._lost is not None:
            raise self._lost

    def watch(self, on_lost: Callable[[RankLost], None]) -> None:
        """``on_lost`` is called once, on another thread, when a rank has died; at once when one has already."""
        with self._gate:
            self._on_lost = on_lost
            lost = self._lost
        if lost is not None:
            on_lost(lost)

    def close(self) -> None:
        """Ends the ranks, with force those that do not end by themselves."""
        self._closing.set()
        for rank in self._ranks:
            rank.channel.close()
        deadline_s = time.monotonic() + END_TIMEOUT_S
        for rank in self._ranks:
            try:
                rank.process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait(END_TIMEOUT_S)
        self._watcher.join(END_TIMEOUT_S)

    # ---- on the thread that the ranks die with

    def _own(self, tasks: list[Task], descriptor: int, started: Future[list[_Rank]]) -> None:
        """Starts the ranks and lives until one of them has ended; the kernel then kills the rest."""
        ranks: list[_Rank] = []
        try:
            for task in tasks:
                ranks.append(_start(task, descriptor))
        except OSError as error:
            started.set_exception(Unavailable(f"cannot start rank {len(ranks) + 1}: {error}"))
            return
        started.set_result(ranks)
        with contextlib.ExitStack() as handles:
            poller, numbers = select.poll(), dict[int, _Rank]()
            for rank in ranks:
                handle = os.pidfd_open(rank.process.pid)
                handles.callback(os.close, handle)
                poller.register(handle, select.POLLIN)
                numbers[handle] = rank
            ended: list[tuple[int, int]] = []
            while not ended:
                ended = poller.poll(WATCH_MS)
            if not self._closing.is_set():
                self._report(numbers[ended[0][0]])

    def _report(self, rank: _Rank) -> None:
        with self._gate:
            self._lost = lost = RankLost(rank.number, f"its process ended with {rank.process.poll()}")
            on_lost = self._on_lost
        log.error("%s", lost)
        if on_lost is not None:
            on_lost(lost)


def require_divisible(spec: ModelSpec, ranks: int) -> None:
    """Raises :class:`ConfigError` naming what of the model ``ranks`` cannot share evenly."""
    shared = {
        "attention heads": spec.heads,
        "key/value heads": spec.kv_heads,
        "MLP columns": spec.intermediate,
        "vocabulary rows": spec.vocab_size,
    }
    for what, count in shared.items():
        if count % ranks:
            raise ConfigError(f"{ranks} ranks cannot share {count} {what} evenly", field="tensor_parallel")


def _start(task: Task, descriptor: int) -> _Rank:
    """One rank's process, with its task already in its socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "engine.rank_process", str(theirs.fileno()), str(descriptor)],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), descriptor),
            env={**os.environ, "PYTHONPATH": path},
        )
    channel = Channel(ours, peer=f"rank {task.rank}")
    channel.send(task)
    return _Rank(task.rank, process, channel)
