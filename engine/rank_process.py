"""A rank other than the first: a process that loads its slice of the model and computes each step it is told of.

Rank 0's process starts it (``engine.ranks``) and is the only one it talks to, except for the sums inside a step.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import cast

import torch

from baton.errors import Unavailable
from baton.layout import Dtype
from engine.channel import Channel, Connect, Ready, Task
from engine.collective import Collective
from engine.comm import Comm, RankLost
from engine.devices import Means
from engine.runner import Runner, Step
from engine.shared_reduce import map_shared

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
IDLE_POLL_S = 5.0
TASK_TIMEOUT_S = 60.0


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; rank 0 decides when to end
    memory_file, steps, copies = map(int, sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        with Channel(_inherited(steps), peer="rank 0") as channel:
            _serve(channel, Channel(_inherited(copies), peer="rank 0"), memory_file)
    except Exception:  # the process's outer boundary; rank 0 sees that it ended
        log.exception("this rank failed")
        return 1
    return 0


def _inherited(descriptor: int) -> socket.socket:
    """It goes to no process that this one starts: rank 0 must see the end of this one."""
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)


def _serve(channel: Channel, copies: Channel, memory_file: int) -> None:
    """Computes steps until rank 0 closes the channel."""
    task = channel.receive(TASK_TIMEOUT_S)
    if task is None:
        return
    assert isinstance(task, Task)
    _end_with(task.parent)
    runner, comm = _load(task, copies, memory_file)
    channel.send(Ready(task.rank))
    with contextlib.ExitStack() as ends:
        if isinstance(comm, Collective):
            ends.callback(comm.close)
        _compute(channel, runner, comm)


def _compute(channel: Channel, runner: Runner, comm: Comm) -> None:
    try:
        while (record := _next(channel)) is not None:
            if isinstance(record, Connect):
                assert isinstance(comm, Collective)
                comm.connect(record.port)
            else:
                assert isinstance(record, Step)
                runner.run(record)
    except RankLost:
        # Whose loss it was, rank 0 finds out; another end now would be taken for its cause.
        log.exception("waiting for the end")
        while _next(channel) is not None:
            pass


def _next(channel: Channel) -> object | None:
    while True:
        try:
            return channel.receive(IDLE_POLL_S)
        except TimeoutError:
            continue  # idle: a rank 0 that has died closes the channel


def _load(task: Task, copies: Channel, memory_file: int) -> tuple[Runner, Comm]:
    from engine.build import load_model  # seconds of imports, after the wish to end with the parent is known
    from engine.ground import ground_for

    memory = map_shared(memory_file)
    os.close(memory_file)

    def check_parent() -> None:
        if os.getppid() != task.parent:
            raise Unavailable("rank 0 has died")

    folder, means, dtype = Path(task.folder), cast(Means, task.means), cast(Dtype, task.dtype)
    ground = ground_for(folder, means, task.ranks, dtype, pages=task.pages, page_tokens=task.page_tokens)
    comm = ground.comm(memory, task.rank, check_peers=check_parent)
    if comm.device.type == "cuda":
        torch.cuda.set_device(comm.device)  # kernels are launched on this thread
    model = load_model(folder, task.dtype, task.threads, comm, max_context=task.max_context)
    cache = ground.cache(memory, task.rank)
    copier = ground.copier(memory, task.rank, cache, comm, copies)
    if copier is not None:
        copier.start()
    return Runner(model, cache), comm


def _end_with(parent: int) -> None:
    """The kernel kills this process, even a stopped one, when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it died before the line above
        raise Unavailable("rank 0 has died")


if __name__ == "__main__":
    sys.exit(main())
