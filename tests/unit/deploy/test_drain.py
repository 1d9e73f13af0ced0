"""The drain of a node ends in time also where nothing answers: a pod's preStop would else last until SIGKILL."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
START_S = 8.0  # of Python on a busy machine, before it can look at a clock


def test_a_head_that_takes_connections_and_says_nothing_does_not_hold_it_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        began_s = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "deploy.drain", "--address", address, "--node-id", "a", "--deadline-s", "3"],
            cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert time.monotonic() - began_s < 3 + START_S
    assert done.returncode == 1
    assert "not empty after 3 s: Ray does not answer" in done.stderr
