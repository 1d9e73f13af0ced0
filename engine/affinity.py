"""Cores of a worker's own: no two pinned workers of a machine share one, and a dead worker's are free at once."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)

LOCK_S = 5.0
POLL_S = 0.01


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

    A claim is a lock on a file, which the system lets go of when its process dies, however it dies. Raises OSError when
    ``folder`` belongs to someone else, or the folder's own lock is not free within ``LOCK_S``.
    """
    _own(folder)
    taken: list[tuple[int, int]] = []
    everything = _lock(folder / "all")
    try:
        for core in cores:
            if len(taken) < count and (lock := _try_lock(folder / str(core))) is not None:
                taken.append((core, lock))
    finally:
        os.close(everything)
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
    try:
        found = claim(count, available, claims_folder())
    except OSError as error:
        log.warning("not pinned: %s", error)
        return None
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


def _own(folder: Path) -> None:
    """Makes ``folder``. It has a name that anyone can guess in a place where anyone can write, so it is looked at."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} is not a folder that only this user can write")


def _lock(path: Path) -> int:
    """As :func:`_try_lock`, but waits: the lock is held for microseconds at a time."""
    deadline_s = time.monotonic() + LOCK_S
    while (descriptor := _try_lock(path)) is None:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"another process has held {path} for {LOCK_S:.0f} s")
        time.sleep(POLL_S)
    return descriptor


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock at ``path``, or None when another process does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
