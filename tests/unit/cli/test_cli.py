"""The command line as a user runs it: exit codes, messages, and what it imports."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import ClassVar

import grpc
import pytest

from baton.config import Config, load
from baton.errors import BatonError, InvalidRequest, Overloaded
from baton.wire import inference_pb2 as pb
from baton.wire import inference_pb2_grpc
from deploy import cli
from router import status as rpc_status

ROOT = Path(cli.__file__).parent.parent
HEAVY = ("torch", "ray", "transformers", "numpy")


def run(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"BATON_HOME": str(home), "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        capture_output=True, text=True, timeout=60, env=environment, cwd=home, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [["--help"], ["status"], ["generate", "hi"]])
def test_client_commands_load_neither_torch_nor_ray(arguments: list[str], tmp_path: Path) -> None:
    script = (
        "import json, sys\nfrom deploy import cli\n"
        f"try:\n    cli.main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    environment = os.environ | {"BATON_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_help_takes_less_than_half_a_second_of_cpu(tmp_path: Path) -> None:
    taken_s = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("--help", home=tmp_path).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken_s) < 0.5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "hi"], 1, "no cluster named baton is running"),
        (["status", "--name", "other"], 1, "no cluster named other is running"),
        (["up", "--decode", "0"], 2, "decode.replicas must be at least 1"),
        (["up", "--transport", "pigeon"], 2, "handoff.transport"),
        (["up", "--codec", "int8"], 2, "quality_floor"),
        (["up", "--grpc-port", "99999"], 2, "ingress.grpc_port"),
        (["up", "--config", "missing.yaml"], 2, "cannot read missing.yaml"),
        (["model", "pull", "no-such-model"], 2, "no-such-model"),
    ],
)
def test_expected_failures_are_one_clear_line(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    done = run(*arguments, home=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_down_without_a_cluster_is_no_error(tmp_path: Path) -> None:
    done = run("down", home=tmp_path)
    assert done.returncode == 0
    assert "no cluster named baton is running" in done.stderr


def test_config_show_prints_what_can_be_loaded_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["config", "show"])
    assert left.value.code == 0
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load(path) == Config()


class Refusing(inference_pb2_grpc.InferenceServicer):  # type: ignore[misc]
    """Refuses each request with the error its text names; serves nothing."""

    errors: ClassVar[dict[str, BatonError]] = {
        "bad": InvalidRequest("sampling.temperature", "must be in [0, 2]"),
        "busy": Overloaded("too much is waiting", retry_after_ms=20),
    }

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        if request.prompt == "plain":
            context.abort(grpc.StatusCode.UNAVAILABLE, "the proxy is tired")
        rpc_status.set_on(context, self.errors[request.prompt])
        yield from ()


@pytest.fixture
def refusing() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    inference_pb2_grpc.add_InferenceServicer_to_server(Refusing(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait(5.0)


@pytest.mark.parametrize(
    ("prompt", "code", "line"),
    [
        ("bad", 2, "error: sampling.temperature: must be in [0, 2]"),
        ("busy", 1, "error: too much is waiting"),
        ("plain", 1, "error: the proxy is tired"),
    ],
)
def test_generate_tells_a_wrong_request_from_a_failing_service(
    refusing: str, prompt: str, code: int, line: str, tmp_path: Path
) -> None:
    done = run("generate", prompt, "--raw", "--address", refusing, home=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (code, line)
