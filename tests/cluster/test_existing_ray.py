"""`baton up --address` on a Ray of three nodes and a Serve that run already: up, one answer, down."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("existing_ray.py")
NAMESPACES = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
TIMEOUT_S = 240


def test_an_application_comes_and_goes_on_a_ray_that_stays(model_folder: Path, tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACES, "true"], check=False).returncode != 0:
        pytest.skip("namespaces are not allowed here: baton up --address is NOT run")
    command = [*NAMESPACES, sys.executable, str(SCRIPT), str(model_folder.parent), json.dumps(list(range(1000, 1300)))]
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, (tmp_path / "log").read_text(errors="replace")[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["endpoints"] == ["gRPC  127.0.0.1:19000", "HTTP  http://127.0.0.1:18000/v1"]
    assert answer["hosts"] == {"prefill": ["127.0.0.2"], "decode": ["127.0.0.3"]}
    assert len(answer["tokens"]) == 32
    assert answer["down"] == [0, "three-nodes has ended"]
