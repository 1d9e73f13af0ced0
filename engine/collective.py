"""Sums over torch.distributed, for ranks that share no memory: NCCL between GPUs, gloo between CPU processes.

The process group is made directly, not the process's default one: two replicas may live in one process, and what
another library does with torch.distributed is its own business. All ranks are on one machine and meet on 127.0.0.1.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed
from torch import Tensor

from engine.comm import RankLost

_torch: Any = torch.distributed  # whose types know neither stores nor the options of its process groups

LOOPBACK = "127.0.0.1"
CONNECT_TIMEOUT_S = 60.0  # every rank has loaded its model by then
CPU_TIMEOUT_S = 10.0  # of one sum, as in engine.shared_reduce
GPU_TIMEOUT_S = 60.0  # of one step: the first one of its shape compiles kernels on every rank
# Rank 0 finds out first and says so. On GPUs torch's own watchdog then ends a process that nobody has ended.
OTHERS_WAIT = 3
NAMING_S = 0.5  # a death is seen on the sockets a moment before who watches the processes knows whose it was
NAMING_POLL_S = 0.01
SETTLE_NAP_S = 50e-6  # well below a decode step; the host's other threads run meanwhile
CHECK_PEERS_S = 0.02


class Collective:
    """One rank's end. Rank 0 calls :meth:`listen`, then all call :meth:`connect` with its port.

    ``check_peers`` raises :class:`RankLost` when it knows that a peer has died; without it, a death shows when its
    connections break (gloo) or by the timeout, as a stopped rank does.
    """

    def __init__(
        self,
        *,
        rank: int,
        ranks: int,
        device: torch.device,
        check_peers: Callable[[], None] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self.rank, self.ranks, self.device = rank, ranks, device
        self.rounds = 0  # sums called so far: what a rank had written before one is in its cache, or on the way there
        self._timeout_s = timeout_s or (GPU_TIMEOUT_S if device.type == "cuda" else CPU_TIMEOUT_S)
        self._check_peers = check_peers
        self._moved = threading.Condition()
        self._store: Any = None
        self._group: Any = None  # a torch.distributed backend; their classes have no common typed methods

    def listen(self) -> int:
        """On rank 0: the port of loopback where the others find each other."""
        meeting = socket.create_server((LOOPBACK, 0))
        port = int(meeting.getsockname()[1])
        # torch would listen on all interfaces by itself.
        self._store = _store(port, is_master=True, master_listen_fd=meeting.detach())
        return port

    def connect(self, port: int) -> None:
        """Returns when all ranks are connected and have made a first sum. Raises :class:`RankLost`."""
        wait_s = self._timeout_s if self.rank == 0 else OTHERS_WAIT * self._timeout_s
        try:
            if self._store is None:
                self._store = _store(port, is_master=False)
            make = _nccl if self.device.type == "cuda" else _gloo
            self._group = make(self._store, self.rank, self.ranks, wait_s)
        except RuntimeError as error:  # every error of torch.distributed is one
            raise self._failed(error) from None
        self.all_reduce(torch.zeros(1, device=self.device))
        self.settle()

    def all_reduce(self, part: Tensor) -> Tensor:
        """The sum of every rank's ``part``, of any shape, in ``part`` itself when its memory is contiguous."""
        part = part.contiguous()
        if part.numel():
            self._do(lambda: self._group.allreduce([part]))
        with self._moved:
            self.rounds += 1
            self._moved.notify_all()
        return part

    def gather(self, part: Tensor) -> Tensor:
        """As :meth:`engine.comm.Comm.gather`."""
        part = part.contiguous()
        rows, width = part.shape
        parts = part.new_empty(self.ranks if self.rank == 0 else 0, rows, width)
        if part.numel():
            options = _torch.GatherOptions()
            options.rootRank = 0
            self._do(lambda: self._group.gather([list(parts)] if self.rank == 0 else [], [part], options))
        return parts.transpose(0, 1).reshape(rows, self.ranks * width) if self.rank == 0 else part

    def settle(self) -> None:
        """As :meth:`engine.comm.Comm.settle`: the host waits for the GPU, but never longer than the timeout."""
        if self.device.type == "cuda":
            reached = torch.cuda.Event()  # type: ignore[no-untyped-call]
            reached.record(torch.cuda.current_stream(self.device))
            self.await_done(reached.query)

    def await_done(self, done: Callable[[], bool]) -> None:
        """Returns when ``done()``. Raises :class:`RankLost` when a peer dies first, or after the timeout."""
        started_s = checked_s = time.monotonic()
        while not done():
            time.sleep(SETTLE_NAP_S)
            now_s = time.monotonic()
            if self._check_peers is not None and now_s - checked_s > CHECK_PEERS_S:
                self._check_peers()
                checked_s = now_s
            if now_s - started_s > self._timeout_s:
                raise RankLost(None, f"the step is not done after {self._timeout_s:g} s")

    def await_round(self, number: int, timeout_s: float) -> None:
        """From another thread: returns when this rank has made ``number`` sums. Raises :class:`RankLost`."""
        with self._moved:
            if not self._moved.wait_for(lambda: self.rounds >= number, timeout_s):
                raise RankLost(self.rank, f"{number - self.rounds} rounds behind for {timeout_s:g} s")

    def close(self) -> None:
        """Breaks the connections, and ends what still waits for a peer on the GPU."""
        group, self._group, self._store = self._group, None, None
        if group is not None:
            group.abort()

    def _do(self, begin: Callable[[], Any]) -> None:
        """Begins a collective; on the CPU it is done on return, on a GPU it is queued behind what was queued before."""
        try:
            begin().wait()
        except RuntimeError as error:
            raise self._failed(error) from None

    def _failed(self, error: RuntimeError) -> RankLost:
        """With the name of the rank if it is known to have died; then it is raised here."""
        deadline_s = time.monotonic() + NAMING_S
        while self._check_peers is not None and time.monotonic() < deadline_s:
            self._check_peers()
            time.sleep(NAMING_POLL_S)
        return RankLost(None, str(error).splitlines()[0])


def _store(port: int, **options: Any) -> Any:
    timeout = timedelta(seconds=CONNECT_TIMEOUT_S)
    return _torch.TCPStore(LOOPBACK, port, timeout=timeout, wait_for_workers=False, **options)


def _gloo(store: Any, rank: int, ranks: int, timeout_s: float) -> Any:
    options = _torch.ProcessGroupGloo._Options()
    options._devices = [_torch.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    options._threads = 1
    options._timeout = timedelta(seconds=CONNECT_TIMEOUT_S)
    group = _torch.ProcessGroupGloo(store, rank, ranks, options)
    group._set_default_timeout(timedelta(seconds=timeout_s))
    return group


def _nccl(store: Any, rank: int, ranks: int, timeout_s: float) -> Any:
    """Its first use connects. A step's timeout is :meth:`Collective.settle`'s; this one is the watchdog's."""
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    options = _torch.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=OTHERS_WAIT * timeout_s)
    group = _torch.ProcessGroupNCCL(store, rank, ranks, options)
    group._set_sequence_number_for_group()
    return group
