"""How fast this machine is while something is measured on it: one small piece of arithmetic, timed again and again.

The cores of a virtual machine are not always as fast: neighbours share their clock, their caches and their siblings.
Here the same matrix product took between 0.8 and 1.2 times its median within seconds and from minute to minute. A
profile says how long a step takes at the speed of its day; the pulse of that day, and that of another, say what to make
of it then.

A beat works within a core's own cache and gives way to nobody: neither waiting for a core nor memory's bandwidth is in
it, since both depend on what else runs here, which models say themselves. It begins after as much work that is not
timed: a core that wakes up is a tenth slower at first, and more often asleep the less there is to do.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TypeAlias

from baton.errors import ConfigError

ROWS, INNER, COLUMNS = 160, 576, 256  # float32: 1.1 MB
REPEATS = 4
BEAT_S = 0.25  # of which 8 ms are work
WINDOW_S = 6.0  # two dozen beats: single ones scatter
STRIDE_S = 2.0
READY_S = 60.0

Beat: TypeAlias = tuple[float, float]
"""When it was, by ``time.perf_counter``, and its seconds."""


class Pulse:
    """A process of its own that beats while this is open. Use with ``with``."""

    def __enter__(self) -> Pulse:
        """Raises :class:`ConfigError` when the process does not start."""
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe(duplex=False)
        self.process = context.Process(target=_beat, args=(there,), daemon=True)
        self.process.start()
        there.close()
        if not self._here.poll(READY_S):
            self.__exit__()
            raise ConfigError(f"no pulse within {READY_S:.0f} s", field="pulse")
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.join()
        self._here.close()

    def read(self) -> float:
        """Median seconds of the beats since the last reading; as :meth:`beats`."""
        return usual(self.beats())

    def beats(self) -> list[Beat]:
        """Those since the last reading; waits for one if there were none.

        Raises :class:`ConfigError` when the process has ended.
        """
        if not self.process.is_alive():
            raise ConfigError("the pulse has stopped", field="pulse")
        beats = [self._here.recv()]
        while self._here.poll():
            beats.append(self._here.recv())
        return beats


def usual(beats: Sequence[Beat]) -> float:
    """Median seconds."""
    return statistics.median([seconds for _, seconds in beats])


def course(beats: Sequence[Beat]) -> list[Beat]:
    """The pulse from each of these times on: every :data:`STRIDE_S` the median of the :data:`WINDOW_S` around it."""
    if not beats:
        return []
    first_s, last_s = beats[0][0], beats[-1][0]
    found = []
    for stride in range(int((last_s - first_s) / STRIDE_S) + 1):
        at_s = first_s + stride * STRIDE_S
        near = [beat for beat in beats if abs(beat[0] - at_s - STRIDE_S / 2) <= WINDOW_S / 2]
        if near:
            found.append((at_s, usual(near)))
    return found


def _beat(parent: Connection) -> None:
    """Until the parent is gone, or reads no more."""
    import torch

    torch.set_num_threads(1)
    left, right = torch.ones(ROWS, INNER), torch.ones(INNER, COLUMNS)
    while True:
        for _ in range(2 * REPEATS):
            torch.mm(left, right)
        started = time.perf_counter()
        for _ in range(REPEATS):
            torch.mm(left, right)
        ended = time.perf_counter()
        parent.send((ended, ended - started))
        time.sleep(BEAT_S)
