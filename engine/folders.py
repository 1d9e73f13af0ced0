"""A cached folder that is made once: by one process, whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from baton.errors import Unavailable

LOCK_WAIT_S = 1800.0
POLL_S = 0.1


class Once:
    """``with Once(cache, name) as once``: fill ``once.work`` unless it is None; then ``once.folder`` is complete.

    One process works at a time, the others wait for it (at most ``LOCK_WAIT_S``, then Unavailable). The work happens
    in a folder beside the target, which is synced and renamed when the block ends well and deleted when it does not.
    What a killed process left behind is deleted by the next one that gets the lock.
    """

    def __init__(self, cache: Path, name: str) -> None:
        self.folder = cache / name
        self.work: Path | None = None  # its parent is scratch space that goes away with it
        self._prefix = f".{name}.tmp-"
        self._lock_path = cache / f".{name}.lock"
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        if self.folder.is_dir():
            return self
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self._lock_path)
        for stale in self.folder.parent.glob(f"{self._prefix}*"):
            shutil.rmtree(stale, ignore_errors=True)
        if not self.folder.is_dir():
            self.work = Path(tempfile.mkdtemp(prefix=self._prefix, dir=self.folder.parent)) / "folder"
            self.work.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.work is not None:
                if error is None:
                    _sync(self.work)
                    os.rename(self.work, self.folder)
                    _sync_one(self.folder.parent)
                shutil.rmtree(self.work.parent, ignore_errors=True)
        finally:
            if self._lock is not None:
                self._lock.close()  # and with it the lock


def _locked(path: Path) -> IO[bytes]:
    opened = path.open("ab")
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return opened
        except BlockingIOError:
            if time.monotonic() > deadline:
                opened.close()
                raise Unavailable(f"another process held {path} for {LOCK_WAIT_S:.0f} s", field="model") from None
            time.sleep(POLL_S)


def _sync(folder: Path) -> None:
    for file in folder.iterdir():
        _sync_one(file)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
