"""The machine that figures come from; without it they mean nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

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
