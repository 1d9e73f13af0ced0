"""Compiles the kernels for this CPU once and keeps the library; later starts and other workers find it there."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
COMPILERS = ("g++", "c++", "clang++")
# No -ffast-math: it would let the compiler cancel the rounding in ``exponential``. Contraction to FMA is on by default.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
CACHE = Path("~/.cache/baton/native")
TIMEOUT_S = 120.0  # a compilation takes 4 s on a core of its own; a busy, small machine gets thirty times as long
POLL_S = 0.1


class BuildError(Exception):
    """There is no library, and the message says what is missing or what the compiler said."""


def library(cache: Path = CACHE, compilers: tuple[str, ...] = COMPILERS) -> Path:
    """The compiled kernels in ``cache``, built now if need be. Raises :class:`BuildError`.

    Workers that start at once build once: the others wait for the first one's lock.
    """
    compiler = next((found for name in compilers if (found := shutil.which(name))), None)
    if compiler is None:
        raise BuildError("no C++ compiler; install one, such as g++ (apt install g++)")
    openmp = _torch_openmp()
    folder = cache.expanduser()
    target = folder / f"kernels-{_fingerprint(compiler, openmp)}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / "lock"):
            if not target.exists():
                _compile(compiler, openmp, target)
    except OSError as error:
        raise BuildError(f"cannot write {folder}: {error}") from None
    return target


def _compile(compiler: str, openmp: Path | None, target: Path) -> None:
    started_s = time.monotonic()
    log.info("compiling the CPU kernels with %s; this takes a few seconds, once", compiler)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        compiled, linked = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
        threads = () if openmp is None else ("-fopenmp",)
        _run([compiler, *FLAGS, *threads, "-c", str(SOURCES / "kernels.cpp"), "-o", str(compiled)])
        # Linked without -fopenmp, which would add the system's runtime: threads belong to torch's, or there are none.
        runtime = () if openmp is None else (str(openmp), f"-Wl,-rpath,{openmp.parent}")
        _run([compiler, "-shared", str(compiled), *runtime, "-o", str(linked)])
        linked.replace(target)
    log.info("compiled the CPU kernels in %.1f s: %s", time.monotonic() - started_s, target)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} did not finish within {TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")


def _torch_openmp() -> Path | None:
    """The OpenMP runtime that torch brought along, so that one pool of threads serves both. None without one."""
    package = Path(torch.__file__).parent
    for folder in (package / "lib", package.parent / "torch.libs"):
        for found in sorted(folder.glob("libgomp*.so*")):
            return found
    return None


def _fingerprint(compiler: str, openmp: Path | None) -> str:
    """What the library depends on: sources, flags, compiler, CPU, OpenMP runtime."""
    digest = hashlib.sha256()
    for source in (*sorted(SOURCES.glob("*.h")), SOURCES / "kernels.cpp"):
        digest.update(source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    digest.update("\n".join((*FLAGS, compiler, version.stdout, str(openmp), _cpu())).encode())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    kept = ("model name", "flags", "Features", "CPU part")
    first = info.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    return "\n".join(line for line in first.splitlines() if line.startswith(kept))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds the lock at ``path``; the system frees it when a process dies. Raises :class:`BuildError` after a while."""
    deadline_s = time.monotonic() + 2 * TIMEOUT_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise BuildError(f"another process has held {path} for {2 * TIMEOUT_S:.0f} s") from None
                time.sleep(POLL_S)
        yield
