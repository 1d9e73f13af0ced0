"""``baton doctor`` as a user runs it: a real handoff between two processes, real faults, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from baton.config_handoff import HandoffConfig
from baton.errors import ConfigError
from baton.layout import KVLayout
from deploy.doctor import ask, bare, examine

LAYOUT = KVLayout("m", 4, 2, 32, "float32")


def doctor(*arguments: str, home: Path, config: str = "") -> subprocess.CompletedProcess[str]:
    if config:
        (home / "c.yaml").write_text(config)
        arguments = (*arguments, "--config", str(home / "c.yaml"))
    environment = os.environ | {"BATON_HOME": str(home), "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", "doctor", *arguments],
        capture_output=True, text=True, timeout=120, env=environment, check=False,
    )  # fmt: skip


def test_this_machine_passes_with_shared_memory_in_use(model_folder: Path, tmp_path: Path) -> None:
    done = doctor("--json", home=tmp_path, config="ingress: {grpc_port: 19731, http_port: 19732}")
    told = json.loads(done.stdout)
    failed = [one for one in told["findings"] if one["status"] == "fail"]
    assert failed == []
    assert (done.returncode, told["exit_code"]) == (0, 0)
    found = {one["check"]: one["found"] for one in told["findings"]}
    assert found["transport"].startswith("nixl: cma"), "the same machine: memory is read directly"
    assert "GB/s" in found["handoff, raw"]
    assert {"python", "packages", "torch", "memlock", "/dev/shm", "port", "model", "layout", "clock"} <= found.keys()


def test_faults_are_told_with_what_mends_them(tmp_path: Path) -> None:
    config = f"model: {{id: gpt-17, cache_dir: {tmp_path}}}\nprefill: {{tensor_parallel: 2}}\n"
    done = doctor(home=tmp_path, config=config)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("fail  model"))
    assert "gpt-17" in lines[at]
    assert lines[at + 1].strip().startswith("why")
    assert lines[at + 2].strip().startswith("fix")
    assert lines[-1].endswith("1 wrong")


def test_a_bad_configuration_is_a_finding(tmp_path: Path) -> None:
    done = doctor("--json", home=tmp_path, config="handoff: {codec: int8}")
    (finding,) = [one for one in json.loads(done.stdout)["findings"] if one["check"] == "config"]
    assert done.returncode == 1
    assert "quality_floor" in finding["found"]


@pytest.mark.parametrize("arguments", [("--name", "absent"), ("--address", "127.0.0.1:9")])
def test_no_cluster_cannot_be_examined(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = doctor(*arguments, home=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""


def findings(prefill: Any, decode: Any, key: Any, transport: str = "tcp") -> dict[str, Any]:
    told = examine.pairs([prefill], [decode], transport=transport, codec="raw", key=key)
    return {f"{one.check} {one.subject}": one for one in told}


def test_a_stopped_worker_is_found_and_the_other_one_is_not_hurt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "CONNECT_S", 1.0)
    monkeypatch.setattr(ask, "ANSWER_S", 1.0)
    with bare.workers(LAYOUT, HandoffConfig(transport="tcp", stall_s=1.0)) as (prefill, decode, key):
        children = psutil.Process().children()
        (pid,) = [c.pid for c in children if any(one.laddr.port == decode.port for one in c.net_connections("tcp4"))]
        os.kill(pid, signal.SIGSTOP)
        try:
            told = findings(prefill, decode, key)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert told["worker bare prefill"].status == "ok"
        assert told["worker bare decode"].status == "fail"
        again = findings(prefill, decode, key)
        assert {one.status for one in again.values()} == {"ok"}


def test_transports_that_cannot_start_say_why() -> None:
    with (
        pytest.raises(ConfigError, match="must hold one block") as refused,
        bare.workers(LAYOUT, HandoffConfig(transport="tcp", staging_bytes=4096)),
    ):
        pass
    assert refused.value.field == "handoff.staging_bytes"
