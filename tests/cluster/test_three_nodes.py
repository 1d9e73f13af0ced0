"""Prefill and decode on different nodes of a real three-node Ray cluster, NIXL between them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.ray

SCRIPT = Path(__file__).with_name("three_nodes.py")
NAMESPACES = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
TIMEOUT_S = 240


def namespaces_allowed() -> bool:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False).returncode == 0


def test_handoff_between_nodes(model_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompt = list(range(1000, 1300))
    command = [sys.executable, str(SCRIPT), str(model_folder.parent), json.dumps(prompt)]
    if namespaces_allowed():
        command = [*NAMESPACES, *command]
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, timeout=TIMEOUT_S, check=False)
    tail = (tmp_path / "log").read_text(errors="replace")[-3000:]
    assert done.returncode == 0, tail
    answer = json.loads(done.stdout.splitlines()[-1])

    assert answer["hosts"] == {"prefill": ["127.0.0.2"], "decode": ["127.0.0.3"]}
    assert answer["transport"] == "nixl"
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    assert answer["tokens"] == expected[0, len(prompt) :].tolist()
