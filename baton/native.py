"""C++ beside Python: compiled for this CPU once, kept under a digest of all it depends on, loaded by plain C names.

No build step and no Python headers are needed, only a compiler; where there is none, the caller has a slower path.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

COMPILERS = ("g++", "c++")
CACHE = Path("~/.cache/baton/native")
TIMEOUT_S = 120.0  # a compilation takes seconds on a core of its own; a busy, small machine gets thirty times as long
LOCK_S = 3 * TIMEOUT_S  # whoever holds the lock compiles, links and moves
POLL_S = 0.1


class BuildError(Exception):
    """There is no library, and the message says what is missing or what the compiler said."""


def library(
    source: Path,
    flags: tuple[str, ...],
    link: tuple[str, ...] = (),
    *,
    cache: Path = CACHE,
    compilers: tuple[str, ...] = COMPILERS,
) -> Path:
    """The shared library made of ``source`` and the headers beside it, built now if need be.

    ``flags`` compile, ``link`` links. Workers that start at once build once: the others wait for the first one's lock.
    Raises :class:`BuildError`.
    """
    compiler = next((found for name in compilers if (found := shutil.which(name))), None)
    if compiler is None:
        raise BuildError("no C++ compiler; install one, such as g++ (apt install g++)")
    try:
        folder = cache.expanduser()
        target = folder / f"{source.stem}-{_fingerprint(source, compiler, flags, link)}.so"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if target.exists():
            return target
        with _alone(target.with_suffix(".lock")):
            if not target.exists():
                _compile(compiler, source, flags, link, target)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        raise BuildError(f"cannot build in {cache}: {error}") from None
    return target


def _compile(compiler: str, source: Path, flags: tuple[str, ...], link: tuple[str, ...], target: Path) -> None:
    started_s = time.monotonic()
    log.info("compiling %s with %s; this takes a few seconds, once", source.name, compiler)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        compiled, linked = Path(scratch) / "part.o", Path(scratch) / "whole.so"
        _run([compiler, *flags, "-fPIC", "-c", str(source), "-o", str(compiled)])
        # Names that nothing defines are found here, not by whoever loads the library.
        _run([compiler, "-shared", "-Wl,-z,defs", str(compiled), *link, "-lm", "-o", str(linked)])
        with linked.open("rb") as written:
            os.fsync(written.fileno())  # a name must not outlive a power cut that its content did not
        linked.replace(target)
    log.info("compiled %s in %.1f s: %s", source.name, time.monotonic() - started_s, target)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} did not finish within {TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-2000:]}")


def _fingerprint(source: Path, compiler: str, flags: tuple[str, ...], link: tuple[str, ...]) -> str:
    """What the library depends on. The CPU is part of it: one home folder may serve machines of several kinds."""
    digest = hashlib.sha256()
    for file in (source, *sorted(source.parent.glob("*.h"))):
        digest.update(file.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    digest.update("\n".join((*flags, *link, compiler, version.stdout, _cpu())).encode())
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
    deadline_s = time.monotonic() + LOCK_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise BuildError(f"another process has held {path} for {LOCK_S:.0f} s") from None
                time.sleep(POLL_S)
        yield
