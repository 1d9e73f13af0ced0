"""The machine that figures come from; without it they mean nothing."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

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
    """Cores in use on average over a time, by everybody on this machine, and those that its host gave to others."""

    busy: float
    stolen: float


class Meter:
    """Reads :class:`Cores` since it was made."""

    def __init__(self) -> None:
        self._since_s, self._then = time.monotonic(), psutil.cpu_times()

    def read(self) -> Cores:
        passed_s, now, then = time.monotonic() - self._since_s, psutil.cpu_times(), self._then
        busy_s = sum(getattr(now, name) - getattr(then, name) for name in ("user", "nice", "system", "irq", "softirq"))
        return Cores(busy_s / passed_s, (now.steal - then.steal) / passed_s)


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
