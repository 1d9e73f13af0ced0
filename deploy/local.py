"""The local cluster: start it in the background, find it again, end it and only it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
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
from baton.secure import load_key, write_key
from deploy import ingress

LOOPBACK = "127.0.0.1"  # everything runs on this machine: nobody else needs to reach the workers
READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
ORPHAN_TIMEOUT_S = 3.0
POLL_S = 0.1
KEY_FILE = "cluster.key"  # of this cluster alone: made at its start, gone with the next start

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


def up(config: Config, *, progress: Progress, supervisor: str = "deploy.supervisor") -> Endpoints:
    """Starts the cluster and returns when it can serve. Raises ConfigError when it runs already, Unavailable when the
    start failed or took longer than ``READY_TIMEOUT_S``; nothing is left running then. ``supervisor``: the module that
    runs it.
    """
    keys = config.security.api_keys_file  # its readers have other working directories
    config = config.with_flags(
        {
            "worker_host": config.worker_host or LOOPBACK,
            "security.api_keys_file": str(Path(keys).expanduser().absolute()) if keys else None,
        }
    )
    folder = root() / config.name
    if _supervisor(folder) is not None:
        raise ConfigError(f"a cluster named {config.name!r} is running; `baton down` ends it", field="name")
    ingress.check(config)
    for port_name in ("grpc_port", "http_port"):
        _require_free(port_name, getattr(config.ingress, port_name))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if load_key(config.security) is None:
        write_key(folder / KEY_FILE)
        config = config.with_flags({"security.cluster_key_file": str((folder / KEY_FILE).absolute())})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump()), encoding="utf-8")
    process = _spawn(folder, supervisor)
    (folder / "pid.json").write_text(json.dumps({"pid": process.pid, "started": process.create_time()}))
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
    _, orphans = psutil.wait_procs(family, timeout=0.5)  # Ray's agents linger for seconds after their raylet
    for orphan in orphans:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.terminate()  # psutil checks the start time: a recycled pid is not touched
    _, stubborn = psutil.wait_procs(orphans, timeout=0.0 if alive else ORPHAN_TIMEOUT_S)
    for orphan in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.kill()
    _, immortal = psutil.wait_procs(stubborn, timeout=ORPHAN_TIMEOUT_S)
    for process in immortal:
        progress(f"pid {process.pid} ({_command(process)}) did not end")
    _remove_scratch(root() / name)
    return True


def _remove_scratch(folder: Path) -> None:
    """Ray's and HAProxy's files, when nobody writes them any more."""
    with contextlib.suppress(OSError):
        shutil.rmtree((folder / "scratch").read_text(encoding="utf-8"))


def _spawn(folder: Path, supervisor: str) -> psutil.Process:
    """The supervisor in a session of its own: it outlives the command that started it, and gets no Ctrl-C."""
    for descriptor in map(int, os.listdir("/dev/fd")):
        with contextlib.suppress(OSError):  # the one that read the list is closed by now
            os.set_inheritable(descriptor, descriptor <= 2)  # a lock of the shell's must not live as long as a cluster
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", supervisor, str(folder)],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setsid=True,
        )
    finally:
        os.close(log)
    return psutil.Process(pid)


def _wait_ready(process: psutil.Process, folder: Path, progress: Progress) -> None:
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
        if not _alive(process) or state.get("phase") == "failed":
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
        ours = process.create_time() == known["started"]
    except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
        return None
    return process if ours and _alive(process) else None


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(" ".join(process.cmdline()).split())[:80]
    except psutil.Error:
        return "gone"


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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
