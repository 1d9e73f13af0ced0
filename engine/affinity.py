"""Cores of a worker's own: no two pinned workers of a machine share one, and a dead worker's are free at once."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)


def claims_folder() -> Path:
    """Where this user's workers on this machine leave their claims."""
    return Path(tempfile.gettempdir()) / f"baton-cores-{os.getuid()}"


class CoreClaim:
    """``cores`` that this process has claimed, until it ends or :meth:`release`."""

    def __init__(self, cores: tuple[int, ...], locks: tuple[int, ...]) -> None:
        """``locks``: descriptors that the process keeps open as long as it keeps the cores."""
        self.cores = cores
        self._locks = locks

    def release(self) -> None:
        for lock in self._locks:
            os.close(lock)


def claim(count: int, cores: Sequence[int], folder: Path) -> CoreClaim | None:
    """The first ``count`` of ``cores`` that nobody has claimed; None when fewer are left.

    A claim is a lock on a file, which the system lets go of when its process dies, however it dies.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    taken: list[tuple[int, int]] = []
    with (folder / "all").open("w") as everything:
        fcntl.flock(everything, fcntl.LOCK_EX)  # held for microseconds: nobody waits for a core under it
        for core in cores:
            if len(taken) < count and (lock := _try_lock(folder / str(core))) is not None:
                taken.append((core, lock))
    found = CoreClaim(tuple(core for core, _ in taken), tuple(lock for _, lock in taken))
    if len(taken) < count:
        found.release()
        return None
    return found


def pin(count: int) -> CoreClaim | None:
    """Keeps this process, with all threads it has and will start, on ``count`` cores of its own.

    Does nothing but log where there are too few free cores, or on a system without affinity. Keep what it returns.
    """
    if not hasattr(os, "sched_setaffinity"):
        log.warning("this system has no core affinity: the worker is not pinned")
        return None
    available = sorted(os.sched_getaffinity(0))
    found = claim(count, available, claims_folder())
    if found is None:
        log.warning("not pinned: fewer than %d of cores %s are free of other pinned workers", count, available)
        return None
    for thread in os.listdir("/proc/self/task"):
        _move(int(thread), found.cores)
    log.info("pinned to cores %s", list(found.cores))
    return found


def _move(thread: int, cores: Sequence[int]) -> None:
    try:
        os.sched_setaffinity(thread, cores)
    except ProcessLookupError:
        log.debug("thread %d ended before it could be pinned", thread)


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock at ``path``, or None when another process does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
