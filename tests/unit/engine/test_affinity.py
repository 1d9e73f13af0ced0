"""Claims of cores, between processes and within one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import affinity

ROOT = Path(__file__).parents[3]


def test_workers_get_cores_of_their_own(tmp_path: Path) -> None:
    first = affinity.claim(1, (0, 1, 2, 3), tmp_path / "claims")
    second = affinity.claim(2, (0, 1, 2, 3), tmp_path / "claims")
    assert first is not None
    assert second is not None
    assert (first.cores, second.cores) == ((0,), (1, 2))
    assert affinity.claim(2, (0, 1, 2, 3), tmp_path / "claims") is None
    third = affinity.claim(1, (0, 1, 2, 3), tmp_path / "claims")  # a claim that failed keeps nothing
    assert third is not None
    assert third.cores == (3,)
    first.release()
    again = affinity.claim(1, (0, 1, 2, 3), tmp_path / "claims")
    assert again is not None
    assert again.cores == (0,)


def test_a_killed_worker_s_cores_are_free(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time; from engine import affinity; "
        "kept = affinity.claim(2, (0, 1), pathlib.Path(sys.argv[1])); print(kept.cores, flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert worker.stdout is not None
    try:
        assert worker.stdout.readline().strip() == "(0, 1)"
        assert affinity.claim(1, (0, 1), tmp_path) is None
    finally:
        worker.kill()
        worker.communicate(timeout=30)
    assert affinity.claim(2, (0, 1), tmp_path) is not None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no core affinity here")
def test_all_threads_of_a_process_are_moved_and_new_ones_stay(tmp_path: Path) -> None:
    code = """
import logging, os, threading
logging.basicConfig(level=logging.INFO)
from engine import affinity
stop = threading.Event()
old = threading.Thread(target=stop.wait); old.start()
kept = affinity.pin(1)
new = threading.Thread(target=stop.wait); new.start()
print({tuple(os.sched_getaffinity(int(t))) for t in os.listdir("/proc/self/task")} == {kept.cores})
stop.set()
second = affinity.pin(1)
print(second)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.stdout.split() == ["True", "None"]
    assert "pinned to cores" in done.stderr
    assert "not pinned: fewer than 1" in done.stderr


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(PermissionError, match="only this user"):
        affinity.claim(1, (0,), tmp_path / "open")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="only this user"):
        affinity.claim(1, (0,), tmp_path / "link")


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "claims"
    folder.mkdir(mode=0o700)
    (tmp_path / "precious").write_text("kept", encoding="utf-8")
    (folder / "all").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        affinity.claim(1, (0,), folder)
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "kept"
