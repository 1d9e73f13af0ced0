"""The edge of the local checks: asks this machine. Nothing here judges."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from baton.config import Config, ModelConfig
from baton.errors import BatonError
from baton.layout import Dtype, KVLayout
from baton.native import COMPILERS
from deploy import local
from deploy.doctor.facts import Machine, ModelFiles, Package, Port, Torch
from engine import hub
from engine.spec import ModelSpec

TORCH_S = 120.0  # importing torch from a cold disk
MAX_HEADER_BYTES = 100 << 20  # of a safetensors file, as its own library allows
_TORCH_SCRIPT = (
    "import json, torch; cuda = torch.version.cuda or ''; "
    "print(json.dumps([torch.__version__, cuda, torch.cuda.device_count() if torch.cuda.is_available() else 0]))"
)


def packages() -> tuple[Package, ...]:
    """Baton's requirements without extras; none when Baton itself is not installed."""
    try:
        texts = importlib.metadata.requires("baton") or []
    except importlib.metadata.PackageNotFoundError:
        return ()
    requirements = [Requirement(text) for text in texts]
    return tuple(_package(one) for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""}))


def _package(requirement: Requirement) -> Package:
    text = f"{requirement.name}{requirement.specifier}"
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Package(text, "", fits=False)
    return Package(text, installed, fits=requirement.specifier.contains(installed, prereleases=True))


def torch() -> Torch:
    """Imports torch in a process of its own: a broken one may crash, and must not take the doctor with it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH_SCRIPT], capture_output=True, text=True, timeout=TORCH_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Torch("", "", 0, f"not imported after {TORCH_S:.0f} s")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1]
        return Torch("", "", 0, last)
    version, cuda, devices = json.loads(done.stdout.splitlines()[-1])
    return Torch(version, cuda, devices)


def machine() -> Machine:
    memory = psutil.virtual_memory()
    tmp = tempfile.gettempdir()
    disk = shutil.disk_usage(tmp)
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), "")
    return Machine(memory.total, memory.available, tmp, disk.total, disk.free, compiler)


def ports(config: Config) -> tuple[Port, ...]:
    """The endpoints' ports, tried by binding them."""
    running = local.endpoints(config.name)
    ours = set() if running is None else {running.grpc, running.http}
    host = config.ingress.host
    return tuple(
        _port(f"ingress.{name}", host, number, ours=f"{host}:{number}" in ours)
        for name, number in (("grpc_port", config.ingress.grpc_port), ("http_port", config.ingress.http_port))
    )


def _port(key: str, host: str, number: int, *, ours: bool) -> Port:
    holder = _holder(number)
    error = ""
    if not holder:
        try:
            socket.create_server((host, number)).close()
        except OSError as problem:
            error = problem.strerror or str(problem)
    return Port(key, number, host, holder, ours, error)


def _holder(number: int) -> str:
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == number:
            return _process(connection.pid)
    return ""


def _process(pid: int | None) -> str:
    if pid is None:
        return "a process of another user"
    try:
        return f"pid {pid} ({psutil.Process(pid).name()})"
    except psutil.Error:
        return f"pid {pid}"


def model(config: ModelConfig) -> ModelFiles:
    """What is on this machine of the model; fetches nothing, reads every weight file's header and length."""
    try:
        folder = hub.find(config.id, config.cache_dir)
    except BatonError as error:
        return ModelFiles(config.id, "", problem=error.message)
    if folder is None:
        return ModelFiles(config.id, "")
    cached = folder != Path(config.id).expanduser()
    try:
        weight_bytes = sum(weights(file) for file in sorted(folder.glob("*.safetensors")))
        if not weight_bytes:
            return ModelFiles(config.id, str(folder), cached, problem="no safetensors file with weights")
        if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
            return ModelFiles(config.id, str(folder), cached, problem="no tokenizer.json or tokenizer.model")
        spec = ModelSpec.from_folder(folder)
        layout = KVLayout(hub.describe(folder), spec.layers, spec.kv_heads, spec.head_dim, _dtype(config.dtype))
    except BatonError as error:
        return ModelFiles(config.id, str(folder), cached, problem=str(error))
    except (OSError, ValueError) as error:
        return ModelFiles(config.id, str(folder), cached, problem=f"cannot be read: {error}")
    return ModelFiles(config.id, str(folder), cached, "", weight_bytes, spec.kv_heads, layout)


def weights(file: Path) -> int:
    """Bytes of the tensors in a safetensors file. Raises OSError, or ValueError when it is damaged or cut off."""
    length = os.stat(file).st_size
    with file.open("rb") as opened:
        head = opened.read(8)
        header_bytes = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < header_bytes <= min(MAX_HEADER_BYTES, length):
            raise ValueError(f"{file.name} is no safetensors file")
        try:
            header = json.loads(opened.read(header_bytes))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise ValueError(f"{file.name} has a damaged header") from None
    wanted = 8 + header_bytes + max(ends, default=0)
    if wanted != length:
        raise ValueError(f"{file.name} has {length} bytes, its header says {wanted}")
    return length - 8 - header_bytes


def _dtype(name: str) -> Dtype:
    from torch import cuda, device

    from engine.weights import choose_dtype

    return choose_dtype(name, device("cuda" if cuda.is_available() else "cpu"))
