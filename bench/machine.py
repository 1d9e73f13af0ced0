"""The machine that figures come from; without it they mean nothing."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

MARK = "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"  # of the environment: its value is one cluster's own (deploy.supervisor)
DISTRIBUTIONS = ("torch", "triton", "ray", "nixl", "grpcio")  # those that are there: a GPU machine may be bare


def describe() -> dict[str, object]:
    """CPU model, usable cores, memory, load at the time, Python, libraries, and the commit that was measured."""
    return {
        "cpu": _first("/proc/cpuinfo", "model name"),
        "cpu_flags": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in _flags()],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": _installed(),
        "commit": _commit(),
    }


@dataclass(frozen=True, slots=True)
class Cores:
    """Cores in use on average over a time. ``engines``: of ``busy``, by threads that give way (``engine.threads``).

    ``others``: of ``busy``, by whoever is neither the service nor this process; None where the service is not known.
    """

    busy: float
    stolen: float  # that the machine's host gave to others
    engines: float
    others: float | None

    @property
    def beside(self) -> float:
        """Of ``busy``, by the service and this process, engines apart; by everybody where the service is not known."""
        return self.busy - self.engines - (self.others or 0.0)


class Meter:
    """Reads :class:`Cores` since it was made. ``ours``: the service's processes, which live longer than the meter."""

    def __init__(self, ours: Sequence[psutil.Process] = ()) -> None:
        self._ours = tuple(ours)
        self._since_s, self._then, self._own_s = time.monotonic(), psutil.cpu_times(), self._spent_s()

    def read(self) -> Cores:
        """Raises :class:`psutil.NoSuchProcess` when one of the service's processes has ended."""
        passed_s, now, then = time.monotonic() - self._since_s, psutil.cpu_times(), self._then
        own_s = self._spent_s() - self._own_s
        busy_s = sum(getattr(now, name) - getattr(then, name) for name in ("user", "nice", "system", "irq", "softirq"))
        others = max(0.0, busy_s - own_s) / passed_s if self._ours else None
        return Cores(busy_s / passed_s, (now.steal - then.steal) / passed_s, (now.nice - then.nice) / passed_s, others)

    def _spent_s(self) -> float:
        """CPU seconds of the service, of this process and of its children so far."""
        me = psutil.Process()
        times = [one.cpu_times() for one in (*self._ours, me, *me.children(recursive=True))]
        return sum(one.user + one.system for one in times)


def service(port: int) -> list[psutil.Process]:
    """The processes of the cluster that listens on ``port`` of this machine; none where nobody does, or who may not be
    looked at. They are known by what Serve's processes inherit from their supervisor."""
    listeners = {
        one.pid
        for one in psutil.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.pid and one.laddr and one.laddr.port == port
    }
    marks = {mark for pid in listeners if (mark := _mark(psutil.Process(pid)))}
    return [one for one in psutil.process_iter() if _mark(one) in marks]


def _mark(process: psutil.Process) -> str:
    try:
        return process.environ().get(MARK, "")
    except psutil.Error:  # ended, or another user's
        return ""


def _installed() -> dict[str, str]:
    present = {each.name for each in metadata.distributions()}
    return {name: metadata.version(name) for name in DISTRIBUTIONS if name in present}


def _flags() -> set[str]:
    return set(_first("/proc/cpuinfo", "flags").split())


def _first(path: str, key: str) -> str:
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return "unknown"


def _commit() -> str:
    """Short hash, with ``+changes`` for a working tree that differs from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+changes", "--exclude=*"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"
