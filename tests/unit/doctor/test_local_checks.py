"""What the doctor makes of facts about one machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from baton.config import Config, parse
from baton.config_handoff import HandoffConfig
from baton.config_security import SecurityConfig
from baton.errors import ConfigError
from baton.host import UNLIMITED
from baton.layout import KVLayout
from deploy.doctor import local_checks as checks
from deploy.doctor.facts import Machine, ModelFiles, Package, Port, Torch
from deploy.doctor.findings import Finding, exit_code
from engine.devices import means_for

CPU, CUDA = Torch("2.13.0", "", 0), Torch("2.13.0", "12.6", 8)
MACHINE = Machine(64 << 30, 48 << 30, "/tmp", 100 << 30, 50 << 30, "/usr/bin/g++")
LAYOUT = KVLayout("m", 30, 3, 64, "float32")
MODEL = ModelFiles("smollm2", "/cache/smollm2", True, "", 270 << 20, 3, LAYOUT)
PORT = Port("ingress.grpc_port", 9000, "127.0.0.1", "", False, "")
CONFIG = Config()


def config(**tree: Any) -> Config:
    return parse(tree)


def helps(finding: Finding | None) -> str:
    """The status; whoever is told of a fault is told why it matters and what mends it, and nobody else."""
    assert finding is not None
    assert bool(finding.why) == bool(finding.fix) == (finding.status != "ok"), finding
    assert finding.found
    return finding.status


@pytest.mark.parametrize(
    ("version", "status"),
    [("3.10.14", "fail"), ("3.11.0", "ok"), ("3.12.7", "ok"), ("3.13.1", "ok"), ("3.14.0", "fail"), ("4.0", "fail")],
)
def test_python(sound: Any, version: str, status: str) -> None:
    assert helps(checks.python(sound.host(python=version))) == status


def test_packages() -> None:
    good, old, gone = Package("a>=1", "1.2", True), Package("b==2", "1.9", False), Package("c", "", False)
    assert [helps(one) for one in checks.packages((good,))] == ["ok"]
    assert [helps(one) for one in checks.packages(())] == ["warn"]
    told = checks.packages((good, old, gone))
    assert [helps(one) for one in told] == ["fail", "fail"]
    assert told[0].fix == "pip install 'b==2'"
    assert "installed: no" in told[1].found


@pytest.mark.parametrize(
    ("gpus", "found", "status", "word"),
    [
        (0, CPU, "ok", "no GPU here"),
        (8, CUDA, "ok", "8 GPUs"),
        (8, CPU, "fail", "without CUDA"),
        (8, replace(CUDA, devices=0), "fail", "driver"),
        (0, Torch("", "", 0, "ImportError: libgomp"), "fail", "libgomp"),
    ],
)
def test_torch(sound: Any, gpus: int, found: Torch, status: str, word: str) -> None:
    finding = checks.torch(sound.host(nvidia_gpus=gpus), found)
    assert helps(finding) == status
    assert word in finding.found


def test_compiler() -> None:
    assert helps(checks.compiler(MACHINE)) == "ok"
    assert helps(checks.compiler(replace(MACHINE, compiler=""))) == "warn"


def test_tensor_parallel_must_divide_the_heads() -> None:
    assert checks.tensor_parallel(CONFIG, MODEL, CPU) == []
    assert checks.tensor_parallel(config(prefill={"tensor_parallel": 3}), MODEL, CPU) == []
    (finding,) = checks.tensor_parallel(config(decode={"tensor_parallel": 2}), MODEL, CPU)
    assert helps(finding) == "fail"
    assert finding.fix == "set decode.tensor_parallel to one of 1, 3"
    assert checks.tensor_parallel(config(decode={"tensor_parallel": 2}), ModelFiles("m", ""), CPU) == []


@pytest.mark.parametrize(("degree", "gpus", "refused"), [(8, 8, False), (8, 4, True), (2, 1, True), (4, 0, False)])
def test_ranks_take_a_gpu_each_as_the_engine_has_it(degree: int, gpus: int, refused: bool) -> None:
    tree = config(decode={"tensor_parallel": degree, "gpus": 1})
    found = checks.tensor_parallel(tree, replace(MODEL, kv_heads=8), replace(CUDA, devices=gpus))
    assert [helps(finding) for finding in found] == ["fail"] * refused
    try:
        means_for(degree, gpus, "x86_64")
    except ConfigError:
        assert refused
    else:
        assert not refused
    on_cpus = config(decode={"tensor_parallel": degree})  # Ray shows no GPU to who asks for none
    assert checks.tensor_parallel(on_cpus, replace(MODEL, kv_heads=8), replace(CUDA, devices=gpus)) == []


@pytest.mark.parametrize(
    ("devices", "limit", "transport", "status"),
    [
        ((), 8 << 20, "nixl", "ok"),
        ((), UNLIMITED, "nixl", "ok"),
        (("mlx5_0",), UNLIMITED, "nixl", "ok"),
        (("mlx5_0",), 256 << 20, "nixl", "ok"),
        (("mlx5_0",), (256 << 20) - 1, "nixl", "fail"),
        (("mlx5_0",), 0, "nixl", "fail"),
        (("mlx5_0",), 0, "tcp", "ok"),
    ],
)
def test_memlock(sound: Any, devices: tuple[str, ...], limit: int, transport: str, status: str) -> None:
    host = sound.host(rdma_devices=devices, memlock_bytes=limit)
    finding = checks.memlock(host, config(handoff={"transport": transport}))
    assert helps(finding) == status
    assert ("mlx5_0" in finding.found) == (status == "fail")


@pytest.mark.parametrize(
    ("limit", "status"), [(UNLIMITED, "ok"), (65536, "ok"), (2048, "ok"), (2047, "warn"), (1023, "fail"), (64, "fail")]
)
def test_open_files(sound: Any, limit: int, status: str) -> None:
    finding = checks.open_files(sound.host(open_files=limit), CONFIG)
    assert helps(finding) == status
    if status != "ok":
        assert finding.fix == "ulimit -n 65536"


def test_open_files_grow_with_the_routers_limit(sound: Any) -> None:
    many = config(router={"max_inflight": 100_000})
    assert checks.open_files(sound.host(), many).fix == "ulimit -n 201024"


def test_shared_memory(sound: Any) -> None:
    assert helps(checks.shared_memory(sound.host())) == "ok"
    assert helps(checks.shared_memory(sound.host(shm_free_bytes=checks.SHM_NEEDED_BYTES))) == "ok"
    assert helps(checks.shared_memory(sound.host(shm_free_bytes=checks.SHM_NEEDED_BYTES - 1))) == "fail"
    assert helps(checks.shared_memory(sound.host(shm_bytes=0, shm_free_bytes=0))) == "fail"


@pytest.mark.parametrize(
    ("total", "free", "status"),
    [(100 << 30, 50 << 30, "ok"), (100 << 30, 4 << 30, "fail"), (2 << 30, 1 << 29, "fail"), (0, 0, "fail")],
)
def test_disk(total: int, free: int, status: str) -> None:
    assert helps(checks.disk(replace(MACHINE, tmp_bytes=total, tmp_free_bytes=free))) == status


def test_memory() -> None:
    assert helps(checks.memory(MACHINE, CONFIG, MODEL, CPU)) == "ok"
    needed = 2 * ((270 << 20) + 16384 * LAYOUT.token_bytes + (256 << 20) + (512 << 20))
    tight = replace(MACHINE, memory_free_bytes=needed)
    assert helps(checks.memory(tight, CONFIG, MODEL, CPU)) == "ok"
    assert helps(checks.memory(replace(tight, memory_free_bytes=needed - 1), CONFIG, MODEL, CPU)) == "warn"
    small = Machine(needed - 1, needed - 1, "/tmp", 1, 1, "")
    assert helps(checks.memory(small, CONFIG, MODEL, CPU)) == "fail"
    more = config(decode={"replicas": 40})
    assert helps(checks.memory(MACHINE, more, MODEL, CPU)) == "fail", "every replica counts"
    assert checks.memory(MACHINE, CONFIG, ModelFiles("m", ""), CPU) is None
    assert checks.memory(MACHINE, CONFIG, MODEL, CUDA) is None


def test_ports() -> None:
    assert helps(checks.port(PORT, "baton")) == "ok"
    taken = replace(PORT, holder="pid 7 (nginx)")
    assert helps(checks.port(taken, "baton")) == "fail"
    assert "pid 7 (nginx)" in checks.port(taken, "baton").found
    own = checks.port(replace(taken, ours=True), "baton")
    assert helps(own) == "ok"
    assert "baton doctor --name baton" in own.found
    assert helps(checks.port(replace(PORT, error="Permission denied"), "baton")) == "fail"


def test_model() -> None:
    assert helps(checks.model(MODEL)) == "ok"
    absent = checks.model(ModelFiles("smollm2", ""))
    assert helps(absent) == "warn"
    assert absent.fix == "baton model pull smollm2"
    unknown = checks.model(ModelFiles("gpt-17", "", problem="is neither a model nor a file here"))
    assert helps(unknown) == "fail"
    assert "model.id" in unknown.fix
    damaged = ModelFiles("m", "/cache/m", cached=True, problem="model.safetensors has 7 bytes")
    assert "baton model pull m" in checks.model(damaged).fix
    own = checks.model(replace(damaged, cached=False))
    assert helps(own) == "fail"
    assert "pull" not in own.fix, "what is not Baton's copy is the operator's to mend"
    assert not own.fix.startswith("mv")


def test_configuration() -> None:
    assert helps(checks.configuration("a.yaml", None)) == "ok"
    finding = checks.configuration("a.yaml", ConfigError("must be at least 1", field="decode.replicas"))
    assert helps(finding) == "fail"
    assert "decode.replicas" in finding.fix
    assert "a.yaml" in checks.configuration("a.yaml", ConfigError("cannot read a.yaml")).fix


@pytest.mark.parametrize(("given", "anybody", "status"), [(1, 0, "ok"), (1, 1, "ok"), (0, 0, "ok"), (0, 1, "warn")])
def test_cluster_key(given: int, anybody: int, status: str) -> None:
    security = SecurityConfig(allow_unauthenticated=bool(anybody))
    assert helps(checks.cluster_key(security, given=bool(given))) == status


def test_why_no_handoff_is_tried() -> None:
    assert checks.no_handoff(CONFIG, MODEL) is None
    assert helps(checks.no_handoff(config(prefill={"replicas": 0}), MODEL)) == "ok"
    assert helps(checks.no_handoff(config(handoff={"transport": "loopback"}), MODEL)) == "fail"
    assert helps(checks.no_handoff(CONFIG, ModelFiles("m", ""))) == "warn"


def test_a_worker_that_does_not_start() -> None:
    error = ConfigError("no UCX agent", field="handoff.transport")
    over_nixl = checks.no_worker(HandoffConfig(), error)
    assert helps(over_nixl) == "fail"
    assert "pip install" in over_nixl.fix
    assert "handoff.transport" in checks.no_worker(HandoffConfig(transport="tcp"), error).fix


def test_exit_codes() -> None:
    fine, odd, bad = (Finding("c", "s", status, "f") for status in ("ok", "warn", "fail"))
    assert exit_code([]) == exit_code([fine, odd]) == 0
    assert exit_code([fine, bad, odd]) == 1
