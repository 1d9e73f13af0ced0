"""The very Serve config that the RayService carries: deployed, asked, drained, killed and upgraded under load."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("cluster_life.py")
NAMESPACES = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
TIMEOUT_S = 280


def test_no_request_is_lost_in_the_life_of_a_cluster(model_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    if shutil.which("unshare") is None or subprocess.run([*NAMESPACES, "true"], check=False).returncode != 0:
        pytest.skip("namespaces are not allowed here: the life of a cluster is NOT tested")
    command = [*NAMESPACES, sys.executable, str(SCRIPT), str(model_folder.parent)]
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, (tmp_path / "log").read_text(errors="replace")[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])

    assert found["reflected"] == found["openai"] != ""
    assert found["drain"] == 0
    # Of a pool of one nothing is left when its node is killed: only then a client may be told to come back.
    assert {tuple(failure) for failure in found["failures"]} <= {
        ("kill", "UNAVAILABLE: no prefill worker is connected")
    }
    assert found["stayed"], "a change of num_replicas alone restarted workers"
    assert 0 < found["after_drain"] < found["after_kill"] < found["after_upgrade"]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    prompt = list(range(1000, 1200))
    with torch.inference_mode():
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    assert found["answers"] == [expected[0, len(prompt) :].tolist()]
