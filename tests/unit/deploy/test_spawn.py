"""The process that runs a local cluster."""

from __future__ import annotations

import os
from pathlib import Path

from deploy import local


def test_a_cluster_holds_nothing_that_its_starter_had_open(tmp_path: Path) -> None:
    """A lock that a shell script holds would otherwise be held until `baton down`."""
    lock = os.open(tmp_path / "lock", os.O_CREAT | os.O_WRONLY)
    os.set_inheritable(lock, True)
    try:
        process = local._spawn(tmp_path, "this")
        opened = {os.readlink(entry) for entry in Path(f"/proc/{process.pid}/fd").iterdir()}
        process.wait(timeout=30)
    finally:
        os.close(lock)
    assert str(tmp_path / "lock") not in opened
    assert str(tmp_path / "log") in opened
