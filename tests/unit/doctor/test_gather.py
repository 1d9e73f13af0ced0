"""The facts are true: each gatherer against this very machine, and against faults provoked on it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from baton import host
from baton.config import Config, ModelConfig, parse
from deploy.doctor import gather


def test_this_machine_as_it_is() -> None:
    facts = host.gather()
    assert facts.hostname == socket.gethostname()
    assert facts.python.split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    assert facts.user_id == os.getuid()
    assert facts.packages["torch"]
    assert facts.shm_bytes >= facts.shm_free_bytes > 0
    assert facts.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert facts.pid_namespace == os.readlink("/proc/self/ns/pid")


def test_limits_are_those_of_the_process() -> None:
    script = "from baton import host; facts = host.gather(); print(facts.memlock_bytes, facts.open_files)"

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))

    done = subprocess.run(
        [sys.executable, "-c", script], preexec_fn=lower, capture_output=True, text=True, check=True,
        env=os.environ | {"UCX_TLS": "tcp"},
    )  # fmt: skip
    assert done.stdout.split() == ["65536", "200"]


def test_rdma_devices_have_an_active_port(tmp_path: Path) -> None:
    for device, port, state in (("mlx5_0", 1, "4: ACTIVE"), ("mlx5_0", 2, "1: DOWN"), ("mlx5_1", 1, "1: DOWN")):
        folder = tmp_path / device / "ports" / str(port)
        folder.mkdir(parents=True)
        (folder / "state").write_text(state + "\n")
    assert host.rdma_devices(tmp_path) == ("mlx5_0",)
    assert host.rdma_devices(tmp_path / "none") == ()


def test_no_space_where_there_is_no_file_system(tmp_path: Path) -> None:
    assert host.space(tmp_path / "none") == (0, 0)
    total, free = host.space(tmp_path)
    assert total >= free > 0


def test_requirements_of_this_installation() -> None:
    found = {one.requirement.split("=")[0].split(">")[0].split("<")[0]: one for one in gather.packages()}
    assert found["torch"].fits
    assert found["torch"].installed.startswith("2.")
    assert "pytest" not in found, "extras are not needed to serve"


def test_torch_is_asked_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert gather.torch().version
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken = gather.torch()
    assert "libcudart" in broken.error
    (tmp_path / "torch.py").write_text("import os; os.abort()")
    assert gather.torch().error


def test_machine() -> None:
    found = gather.machine()
    assert found.memory_bytes > found.memory_free_bytes > 0
    assert found.tmp_bytes > found.tmp_free_bytes
    assert found.compiler == (shutil.which("g++") or shutil.which("c++") or "")


def test_ports_in_use_free_and_forbidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATON_HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        taken, free = server.getsockname()[1], other.getsockname()[1]
        other.close()
        grpc, http = gather.ports(parse({"ingress": {"grpc_port": taken, "http_port": free}}))
        assert f"pid {os.getpid()}" in grpc.holder
        assert not grpc.ours
        assert (http.holder, http.error) == ("", "")
        elsewhere = parse({"ingress": {"host": "203.0.113.7", "grpc_port": free, "http_port": free}})
        assert gather.ports(elsewhere)[0].error
    assert isinstance(Config(), Config)


def test_the_embedded_model(model_folder: Path) -> None:
    found = gather.model(ModelConfig(dtype="bfloat16"))
    assert (found.problem, found.folder, found.kv_heads) == ("", str(model_folder), 3)
    assert found.layout is not None
    assert (found.layout.layers, found.layout.dtype) == (30, "bfloat16")
    assert found.cached
    assert found.weight_bytes == pytest.approx(
        sum(f.stat().st_size for f in model_folder.glob("*.safetensors")), rel=0.01
    )


def test_models_that_are_not_here(tmp_path: Path) -> None:
    absent = gather.model(ModelConfig(cache_dir=str(tmp_path)))
    assert (absent.folder, absent.problem) == ("", "")
    unknown = gather.model(ModelConfig(id="no such model", cache_dir=str(tmp_path)))
    assert "neither a model nor a file" in unknown.problem
    (tmp_path / "empty").mkdir()
    assert "config.json" in gather.model(ModelConfig(id=str(tmp_path / "empty"))).problem


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    """The embedded model with links for the large files, to be damaged."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def cut(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    with file.open("rb") as opened:
        start = opened.read(1 << 20)
    file.unlink()
    file.write_bytes(start)


def replace_with(name: str, content: bytes) -> Any:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).write_bytes(content)

    return damage


def dangle(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.unlink()
    file.symlink_to(folder / "gone")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def no_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut, "its header says"),
        (replace_with("model.safetensors", b""), "is no safetensors file"),
        (replace_with("model.safetensors", b"\xff" * 64), "is no safetensors file"),
        (replace_with("model.safetensors", (9).to_bytes(8, "little") + b'{"a": 1} '), "damaged header"),
        (replace_with("config.json", b"{"), "config.json"),
        (replace_with("config.json", json.dumps({"model_type": "bert"}).encode()), "bert"),
        (dangle, "cannot be read"),
        (no_tokenizer, "tokenizer"),
        (no_weights, "no safetensors"),
    ],
)
def test_damaged_models_are_described(copy: Path, damage: Any, problem: str) -> None:
    assert gather.model(ModelConfig(id=str(copy))).problem == ""
    damage(copy)
    found = gather.model(ModelConfig(id=str(copy)))
    assert problem in found.problem
    assert not found.cached
