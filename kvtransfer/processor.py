"""Processors of this process, and what a thread waits for one, as Linux counts it."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup/cpu.max")
_MOST_BYTES = 96  # of a thread's schedstat: three numbers
_local = threading.local()


class _Account:
    """The calling thread's /proc/.../schedstat, open as long as the thread lives: opening costs ten times a reading."""

    def __init__(self) -> None:
        self._fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def waited_s(self) -> float:
        return int(os.pread(self._fd, _MOST_BYTES, 0).split()[1]) * 1e-9

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it could not be opened
            os.close(self._fd)


def waited_s() -> float:
    """How long the calling thread could have run since it began, and had no processor; always 0 where nobody counts."""
    try:
        account: _Account | None = _local.account
    except AttributeError:
        try:
            account = _Account()
        except OSError:
            account = None
        _local.account = account
    return account.waited_s() if account is not None else 0.0


def cores() -> float:
    """Processors that this process may use at once: by affinity, and by its control group's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CGROUP.read_text().split()
    except (OSError, ValueError):
        return float(affinity)
    return float(affinity) if quota == "max" else min(float(affinity), int(quota) / int(period))
