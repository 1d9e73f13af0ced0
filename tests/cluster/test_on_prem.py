"""The template for machines of one's own: started by its own commands on machines with its own addresses, and asked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("on_prem.py")
NAMESPACES = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
BRIDGE = "ip link add br0 type bridge && ip link add v0 type veth peer name v1"
TIMEOUT_S = 280


def test_the_template_s_commands_make_a_cluster_that_answers(model_folder: Path, tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACES, "sh", "-c", BRIDGE], check=False).returncode:
        pytest.skip("namespaces or bridges are not allowed here: deploy/ray/on-prem.yaml is NOT run")
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run(
            [*NAMESPACES, sys.executable, str(SCRIPT), str(model_folder.parent)],
            stdout=subprocess.PIPE, stderr=log, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    assert done.returncode == 0, (tmp_path / "log").read_text(errors="replace")[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["workers"] == {"prefill": ["10.0.0.3"], "decode": ["10.0.0.4"]}
    assert set(found["answers"]) == {"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"}
    assert len(set(found["answers"].values())) == 1
    assert found["answers"]["10.0.0.1"].strip()
