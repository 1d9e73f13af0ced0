"""The local cluster: start it in the background, find it again, end it and only it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from baton.config import Config
from baton.errors import ConfigError, Unavailable

READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.1

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a running local cluster is reached, and what runs it."""

    name: str
    grpc: str  # host:port
    http: str
    pid: int
    log_dir: str


def root() -> Path:
    """Where the state of local clusters is kept: ``$BATON_HOME`` or ``~/.baton``."""
    return Path(os.environ.get("BATON_HOME", "~/.baton")).expanduser() / "clusters"


def up(config: Config, *, progress: Progress) -> Endpoints:
    """Starts the cluster and returns when it can serve. Raises ConfigError when it runs already, Unavailable when the
    start failed or took longer than ``READY_TIMEOUT_S``; nothing is left running then.
    """
    folder = root() / config.name
    if _supervisor(folder) is not None:
        raise ConfigError(f"a cluster named {config.name!r} is running; `baton down` ends it", field="name")
    for port_name in ("grpc_port", "http_port"):
        _require_free(port_name, getattr(config.ingress, port_name))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump()), encoding="utf-8")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.supervisor", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (folder / "pid.json").write_text(json.dumps({"pid": process.pid, "started": _started(process.pid)}))
    try:
        _wait_ready(process, folder, progress)
    except BaseException:
        down(config.name, progress=progress)
        raise
    found = endpoints(config.name)
    if found is None:
        raise Unavailable(f"the cluster ended right after its start; see {folder / 'log'}")
    return found


def endpoints(name: str) -> Endpoints | None:
    """The running cluster called ``name``, or None."""
    folder = root() / name
    state, process = _state(folder), _supervisor(folder)
    if process is None or state.get("phase") != "ready":
        return None
    return Endpoints(name, state["grpc"], state["http"], process.pid, str(folder))


def down(name: str, *, progress: Progress) -> bool:
    """Ends the cluster called ``name``, gently first; False when none runs. Touches no process it did not start."""
    process = _supervisor(root() / name)
    if process is None:
        return False
    family = [process, *process.children(recursive=True)]
    progress(f"stopping {name} (pid {process.pid})")
    process.terminate()
    _, alive = psutil.wait_procs([process], timeout=STOP_TIMEOUT_S)
    _, orphans = psutil.wait_procs(family, timeout=5.0 if not alive else 0.0)
    for orphan in orphans:
        progress(f"ending pid {orphan.pid}, which did not stop by itself")
        orphan.kill()  # psutil checks the start time: a recycled pid is not touched
    psutil.wait_procs(orphans, timeout=5.0)
    return True


def _wait_ready(process: subprocess.Popen[bytes], folder: Path, progress: Progress) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    lines = _progress_lines(folder / "progress")
    while time.monotonic() < deadline_s:
        for line in lines:
            if line is None:
                break
            progress(line)
        state = _state(folder)
        if state.get("phase") == "ready":
            return
        if process.poll() is not None or state.get("phase") == "failed":
            raise Unavailable(
                f"the cluster did not start: {state.get('error', 'no reason given')}; see {folder / 'log'}"
            )
        time.sleep(POLL_S)
    raise Unavailable(f"the cluster was not ready after {READY_TIMEOUT_S:.0f} s; see {folder / 'log'}")


def _progress_lines(path: Path) -> Iterator[str | None]:
    """Lines as the supervisor writes them; None whenever there is no new one yet."""
    while not path.exists():
        yield None
    with path.open(encoding="utf-8") as file:
        while True:
            line = file.readline()
            yield line.rstrip("\n") if line else None


def _supervisor(folder: Path) -> psutil.Process | None:
    """The live supervisor of the cluster in ``folder``; a recycled pid does not count."""
    try:
        known = json.loads((folder / "pid.json").read_text(encoding="utf-8"))
        process = psutil.Process(known["pid"])
        alive = process.create_time() == known["started"] and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
        return None
    return process if alive else None


def _started(pid: int) -> float:
    return psutil.Process(pid).create_time()


def _state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _require_free(field: str, port: int) -> None:
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
            raise ConfigError(f"port {port} is in use by pid {connection.pid}", field=f"ingress.{field}")
