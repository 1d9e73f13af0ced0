"""A rank other than the first: a process that loads its slice of the model and computes each step it is told of.

Rank 0's process starts it (``engine.ranks``) and is the only one it talks to, except for the sums inside a step.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from baton.errors import Unavailable
from engine.channel import Channel, Ready, Task
from engine.runner import Runner, Step
from engine.shared_cache import Segment
from engine.shared_reduce import SharedReduce, map_shared

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
IDLE_POLL_S = 5.0
TASK_TIMEOUT_S = 60.0


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; rank 0 decides when to end
    descriptor, memory = int(sys.argv[1]), int(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        with Channel(socket.socket(fileno=descriptor), peer="rank 0") as channel:
            _serve(channel, memory)
    except Exception:  # the process's outer boundary; rank 0 sees that it ended
        log.exception("this rank failed")
        return 1
    return 0


def _serve(channel: Channel, memory: int) -> None:
    """Computes steps until rank 0 closes the channel."""
    task = channel.receive(TASK_TIMEOUT_S)
    if task is None:
        return
    assert isinstance(task, Task)
    _end_with(task.parent)
    runner = _load(task, memory)
    channel.send(Ready(task.rank))
    while True:
        try:
            step = channel.receive(IDLE_POLL_S)
        except TimeoutError:
            continue  # idle: a rank 0 that has died closes the channel
        if step is None:
            return
        assert isinstance(step, Step)
        runner.run(step)


def _load(task: Task, memory: int) -> Runner:
    from engine.build import load_model  # seconds of imports, after the wish to end with the parent is known

    mapped = map_shared(memory)
    os.close(memory)

    def check_parent() -> None:
        if os.getppid() != task.parent:
            raise Unavailable("rank 0 has died")

    comm = SharedReduce(mapped, rank=task.rank, ranks=task.ranks, check_peers=check_parent)
    model = load_model(Path(task.folder), task.dtype, task.threads, comm)
    segment = Segment(model.layout, task.ranks, task.pages, task.page_tokens)
    return Runner(model, segment.cache(mapped, task.rank))


def _end_with(parent: int) -> None:
    """The kernel kills this process, even a stopped one, when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # it died before the line above
        raise Unavailable("rank 0 has died")


if __name__ == "__main__":
    sys.exit(main())
