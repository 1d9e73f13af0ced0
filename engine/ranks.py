"""Rank 0's hold on the other ranks of its tensor-parallel replica: it starts them, tells them each step, and learns of
their death.

    rank 0's process                          rank r's process (``engine.rank_process``)
    start ── Task ──────────────────────────> load its slice of the model
    await_ready <──────────────────── Ready ──
       ── Connect ──────────────────────────> meet the others (:mod:`engine.collective` only)
    send ── Step ───────────────────────────> run the same step over its own heads
            <═ sums of the step: engine.shared_reduce or engine.collective ═>
    cache ── Gather, Scatter ───────────────> copy its own heads (:mod:`engine.private_cache` only)
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

from baton.errors import ConfigError, Unavailable
from baton.records import pack
from engine import weights
from engine.channel import Channel, Connect, Ready, Task
from engine.collective import Collective
from engine.comm import RankLost
from engine.devices import Means, choose_means, device_of
from engine.ground import ground_for
from engine.runner import Step
from engine.shared_reduce import create_shared, map_shared
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
    copies: Channel  # of its own, lest a copy wait behind a step

    def end(self, timeout_s: float) -> None:
        """Waits for its end, which closing its channels asked for; then with force."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(END_TIMEOUT_S)

    def close(self) -> None:
        self.channel.close()
        self.copies.close()


class Ranks:
    """Ranks 1 to ``ranks - 1`` as processes, and what rank 0 shares with them. Close it, or end the process.

    ``comm`` is rank 0's end of the sums, ``cache`` the KV of all ranks, ``cache.own`` rank 0's part of it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        ranks: int,
        dtype: str,
        threads: int,
        max_context: int | None = None,
        pages: int,
        page_tokens: int,
        means: Means | None = None,
        round_timeout_s: float | None = None,
    ) -> None:
        """Starts them. ``dtype`` as :func:`engine.weights.choose_dtype` takes it; ``threads`` of torch in each;
        ``max_context`` as :func:`engine.build.load_model`; ``means`` and ``round_timeout_s`` as suits this machine.

        Raises :class:`ConfigError` when the model cannot be shared among ``ranks``, or this machine has too few GPUs;
        no process has been started then.
        """
        means = choose_means(ranks) if means is None else means
        require_divisible(ModelSpec.from_folder(folder), ranks)
        weights.checkpoint_files(folder)  # one error here rather than one from each rank
        compute = weights.choose_dtype(dtype, device_of(means, 0))
        ground = ground_for(folder, means, ranks, compute, pages=pages, page_tokens=page_tokens)
        self._gate = threading.Lock()
        self._lost: RankLost | None = None
        self._on_lost: Callable[[RankLost], None] | None = None
        self._closing = threading.Event()
        memory_file = create_shared(ground.shared_bytes)
        try:
            memory = map_shared(memory_file)
            self.comm = ground.comm(memory, 0, check_peers=self.check, timeout_s=round_timeout_s)
        except BaseException:
            os.close(memory_file)
            raise
        tasks = [
            Task(rank, ranks, str(folder), compute, threads, max_context, pages, page_tokens, means, os.getpid())
            for rank in range(1, ranks)
        ]
        self._ranks = self._start(tasks, memory_file)
        log.info("tensor parallel: %d ranks meet by %s", ranks, means)
        others = [rank.copies for rank in self._ranks]
        self.cache = ground.whole(memory, self.comm, others, check=self.check, on_lost=self._lose)

    @property
    def pids(self) -> list[int]:
        """Processes of ranks 1, 2, ..."""
        return [rank.process.pid for rank in self._ranks]

    def await_ready(self) -> None:
        """Returns when every rank has loaded its slice and is connected. Raises :class:`RankLost` when one is not."""
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        for rank in self._ranks:
            try:
                answer = rank.channel.receive(deadline_s - time.monotonic())
            except TimeoutError:
                raise RankLost(rank.number, f"not ready after {READY_TIMEOUT_S:g} s") from None
            if not isinstance(answer, Ready):
                raise RankLost(rank.number, "it ended while it loaded the model; its log says why")
        if isinstance(self.comm, Collective):
            port = self.comm.listen()
            self._tell(Connect(port))
            self.comm.connect(port)

    def send(self, step: Step) -> None:
        """Tells every other rank to run ``step``. Raises :class:`RankLost`."""
        self.check()
        self._tell(step)

    def check(self) -> None:
        """Raises :class:`RankLost` when a rank is known to be lost."""
        if self._lost is not None:
            raise self._lost

    def watch(self, on_lost: Callable[[RankLost], None]) -> None:
        """``on_lost`` is called once, on another thread, when a rank is lost; at once when one is already."""
        with self._gate:
            self._on_lost = on_lost
            lost = self._lost
        if lost is not None:
            on_lost(lost)

    def close(self) -> None:
        """Ends the ranks, with force those that do not end by themselves."""
        self._closing.set()
        for rank in self._ranks:
            rank.close()
        deadline_s = time.monotonic() + END_TIMEOUT_S
        for rank in self._ranks:
            rank.end(max(0.0, deadline_s - time.monotonic()))
        self._watcher.join(END_TIMEOUT_S)
        if isinstance(self.comm, Collective):
            self.comm.close()

    def _tell(self, record: Connect | Step) -> None:
        body = pack(record)
        for rank in self._ranks:
            try:
                rank.channel.send_packed(body)
            except OSError as error:  # TimeoutError is one
                raise RankLost(rank.number, f"it does not take steps: {error}") from None

    def _lose(self, lost: RankLost) -> None:
        """The first loss counts; what follows from it is none."""
        with self._gate:
            if self._lost is not None or self._closing.is_set():
                return
            self._lost, on_lost = lost, self._on_lost
        log.error("%s", lost)
        if on_lost is not None:
            on_lost(lost)

    def _start(self, tasks: list[Task], memory_file: int) -> list[_Rank]:
        started: Future[list[_Rank]] = Future()
        self._watcher = threading.Thread(
            target=self._own, args=(tasks, memory_file, started), name="ranks", daemon=True
        )
        self._watcher.start()
        try:
            return started.result(START_TIMEOUT_S)
        except TimeoutError:
            self._closing.set()
            raise Unavailable(f"the ranks did not start within {START_TIMEOUT_S:g} s") from None

    # ---- on the thread that the ranks die with

    def _own(self, tasks: list[Task], memory_file: int, started: Future[list[_Rank]]) -> None:
        """Starts the ranks and lives until one of them has ended; the kernel then kills the rest.

        ``memory_file`` is this thread's: closed by another, its number might be another file's before a rank inherits.
        """
        ranks: list[_Rank] = []
        try:
            for task in tasks:
                ranks.append(_start_rank(task, memory_file))
        except OSError as error:
            _end_all(ranks)
            started.set_exception(Unavailable(f"cannot start rank {len(ranks) + 1}: {error}"))
            return
        finally:
            os.close(memory_file)
        if self._closing.is_set():  # nobody waits for them any more
            _end_all(ranks)
            return
        started.set_result(ranks)
        ended = self._first_end(ranks)
        self._lose(RankLost(ended.number, f"its process ended with {ended.process.poll()}"))

    @staticmethod
    def _first_end(ranks: list[_Rank]) -> _Rank:
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
            return numbers[ended[0][0]]


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


def _start_rank(task: Task, memory_file: int) -> _Rank:
    """One rank's process, with its task already in its socket."""
    name, path = f"rank {task.rank}", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
        inherited, channels = [memory_file], []
        for _ in range(2):
            end, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            channels.append(ours.enter_context(Channel(end, peer=name)))
            inherited.append(theirs.enter_context(other).fileno())
        channels[0].send(task)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "engine.rank_process", *map(str, inherited)],
            stdin=subprocess.DEVNULL,
            pass_fds=inherited,
            env={**os.environ, "PYTHONPATH": path},
        )
        ours.pop_all()
    return _Rank(task.rank, process, *channels)


def _end_all(ranks: list[_Rank]) -> None:
    for rank in ranks:
        rank.close()
        rank.end(END_TIMEOUT_S)
