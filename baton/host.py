"""What a process can say of the machine that it runs on; facts only, judged elsewhere (``deploy.doctor``)."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("baton", "torch", "nixl", "ray")
UNLIMITED = -1
_PROC, _SYS = Path("/proc"), Path("/sys")


@dataclass(frozen=True, slots=True)
class HostFacts:
    """A record of the token plane too, so that a worker can tell it of its own machine (``Inspected``)."""

    hostname: str
    boot_id: str  # two processes with the same one run under one kernel
    pid_namespace: str  # only within one may a process read another's memory (CMA)
    user_id: int
    ptrace_scope: int  # kernel.yama.ptrace_scope; above 0 siblings may not read each other's memory
    clock_s: float  # seconds since the epoch, when the facts were gathered
    python: str
    packages: dict[str, str]  # versions of those of PACKAGES that are installed
    memlock_bytes: int  # soft limit of locked memory, which RDMA registration counts against; UNLIMITED
    open_files: int  # soft limit; UNLIMITED
    shm_bytes: int  # of /dev/shm
    shm_free_bytes: int
    rdma_devices: tuple[str, ...]  # with an active port
    nvidia_gpus: int  # device files, whether or not torch can use them
    ucx: dict[str, str]  # UCX_* of the environment


def gather() -> HostFacts:
    """Facts of this process and its machine. What cannot be read counts as absent."""
    shm_bytes, shm_free_bytes = space("/dev/shm")
    return HostFacts(
        hostname=platform.node(),
        boot_id=_text(_PROC / "sys/kernel/random/boot_id"),
        pid_namespace=_link(_PROC / "self/ns/pid"),
        user_id=os.getuid(),
        ptrace_scope=int(_text(_PROC / "sys/kernel/yama/ptrace_scope") or 0),
        clock_s=time.time(),
        python=platform.python_version(),
        packages={name: version for name in PACKAGES if (version := _version(name))},
        memlock_bytes=_soft_limit(resource.RLIMIT_MEMLOCK),
        open_files=_soft_limit(resource.RLIMIT_NOFILE),
        shm_bytes=shm_bytes,
        shm_free_bytes=shm_free_bytes,
        rdma_devices=rdma_devices(_SYS / "class/infiniband"),
        nvidia_gpus=sum(1 for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()),
        ucx={name: value for name, value in sorted(os.environ.items()) if name.startswith("UCX_")},
    )


def space(path: str | Path) -> tuple[int, int]:
    """Total and free bytes of the file system at ``path``; zeros when there is none."""
    try:
        state = os.statvfs(path)
    except OSError:
        return 0, 0
    return state.f_frsize * state.f_blocks, state.f_frsize * state.f_bavail


def rdma_devices(folder: Path) -> tuple[str, ...]:
    """Names of the devices in ``folder`` (sysfs) that have an active port."""
    states = sorted(folder.glob("*/ports/*/state"))
    return tuple(dict.fromkeys(state.parents[2].name for state in states if "ACTIVE" in _text(state)))


def _soft_limit(which: int) -> int:
    soft, _ = resource.getrlimit(which)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def _version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""
