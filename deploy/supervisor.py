"""The process behind ``baton up``: starts a private Ray, runs the application, and takes both down on SIGTERM.

Ray is a child of this process, so that nothing outlives it. ``deploy.local`` starts it and reads its state file.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from baton import logs
from baton.config import Config, load
from baton.errors import ConfigError
from baton.secure import load_key
from deploy import ingress, serve_config
from router.gate import front_token

INGRESS_PORTS = 64  # for the router replicas of one cluster, per protocol; released ones stay blocked for a while
PORT_RANGE = (20000, 32000)  # below the ephemeral ports, which outgoing connections take
PORT_TRIES = 100
OBJECT_STORE_BYTES = 100 << 20  # nothing large ever goes through Ray objects


def environment(config: Config, folder: Path) -> dict[str, str]:
    """What Ray and Serve read once at import: HAProxy ingress with its files and ports private to this cluster."""
    haproxy, key = folder / "h", load_key(config.security)
    defences = ingress.install(config, haproxy, front_token(key) if key is not None else "")
    ports = free_ports(2 * INGRESS_PORTS + 4)
    return (
        serve_config.environment(config)
        | defences
        | {
            "RAY_AUTH_MODE": "disabled",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # the one front is near, and `baton down` waits
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports + 2 * INGRESS_PORTS),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(ports + 2 * INGRESS_PORTS + 1),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports + 2 * INGRESS_PORTS + 2),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports + 2 * INGRESS_PORTS + 3),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports + INGRESS_PORTS - 1),
            "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(ports + INGRESS_PORTS),
            "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(ports + 2 * INGRESS_PORTS - 1),
        }
    )


def scratch_folder() -> Path:
    """A fresh folder with a short name: sockets of Ray and HAProxy live deep below it, and their paths end at 97."""
    return Path(tempfile.mkdtemp(prefix="bt-", dir="/tmp"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="state folder of this cluster, holding config.yaml")
    folder: Path = parser.parse_args().folder
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    config = load(folder / "config.yaml")
    logs.configure(config.observe, "supervisor")
    scratch = scratch_folder()
    (folder / "scratch").write_text(str(scratch), encoding="utf-8")
    os.environ.update(environment(config, scratch))
    return _run(config, folder, scratch, stop)


def _run(config: Config, folder: Path, scratch: Path, stop: threading.Event) -> int:
    import ray
    from ray import serve

    _tell(folder, "starting Ray")
    try:
        ray.init(
            num_cpus=max(os.cpu_count() or 1, _cpus_needed(config)),
            resources=_resources_needed(config),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=str(scratch / "ray"),
            namespace=config.name,
        )
        _serve(config, folder, stop)
        _write(folder, phase="stopping")
    except Exception as error:  # the process's outer boundary: the reason goes to the log and to whoever waits
        logging.exception("the cluster failed")
        _write(folder, phase="failed", error=f"{type(error).__name__}: {error}")
        return 1
    finally:
        serve.shutdown()
        ray.shutdown()
    _write(folder, phase="stopped")
    return 0


def start_serve(tree: Mapping[str, Any]) -> None:
    """Serve as :func:`deploy.serve_config.serve_config` has it; returns when every replica runs.

    Told to Serve piece by piece, which spares a local start the process in which ``serve deploy`` builds applications.
    """
    from ray import serve
    from ray.serve.config import HTTPOptions, gRPCOptions

    from deploy.app import assemble

    serve.start(
        proxy_location=tree["proxy_location"],
        http_options=HTTPOptions(**tree["http_options"]),
        grpc_options=gRPCOptions(**tree["grpc_options"]),
    )
    for app in tree["applications"]:
        target = assemble(app["args"], app["deployments"])
        serve.run(target, name=app["name"], route_prefix=app["route_prefix"])


def _serve(config: Config, folder: Path, stop: threading.Event) -> None:
    """Runs the application until ``stop``; tells of every replica that comes up."""
    _tell(folder, "starting Serve, loading the model in every worker")
    told = threading.Event()
    watcher = threading.Thread(target=_tell_replicas, args=(folder, config.name, told), daemon=True)
    watcher.start()
    try:
        start_serve(serve_config.serve_config(config))
    finally:
        told.set()
        watcher.join(5.0)
    host = config.ingress.host
    _write(folder, phase="ready", grpc=f"{host}:{config.ingress.grpc_port}", http=f"{host}:{config.ingress.http_port}")
    stop.wait()


def _tell_replicas(folder: Path, app: str, told: threading.Event) -> None:
    """Until ``told``: one progress line whenever the number of running replicas changes."""
    import ray
    from ray import serve

    last = ""
    while not told.wait(0.5):
        try:
            application = serve.status().applications.get(app)
        except ray.exceptions.RayError:  # Serve's controller is not up yet
            continue
        if application is None:
            continue
        line = ", ".join(
            f"{name} {deployment.replica_states.get('RUNNING', 0)}/{sum(deployment.replica_states.values())}"
            for name, deployment in sorted(application.deployments.items())
        )
        if line and line != last:
            _tell(folder, f"workers running: {line}")
            last = line


def _cpus_needed(config: Config) -> int:
    options = serve_config.deployments(config)
    return 3 + int(sum(one["ray_actor_options"]["num_cpus"] * _most_replicas(one) for one in options))


def _most_replicas(options: dict[str, Any]) -> int:
    """So many of them there may be: room for an upgrade included."""
    most: int = options["num_replicas"] if "num_replicas" in options else options["autoscaling_config"]["max_replicas"]
    surge: int = math.ceil(most * options["max_surge_percent"] / 100)
    return most + surge


def _resources_needed(config: Config) -> dict[str, float]:
    total: dict[str, float] = {}
    for options in serve_config.deployments(config):
        for name, amount in options["ray_actor_options"]["resources"].items():
            total[name] = total.get(name, 0.0) + amount * _most_replicas(options)
    return total


def free_ports(count: int) -> int:
    """The first of ``count`` consecutive ports that nobody listens on.

    Serve binds its replicas' gRPC ports with SO_REUSEPORT: two clusters of one machine that use the same range would
    both get the port, and the kernel would hand half of one cluster's requests to the other.
    """
    taken = {connection.laddr.port for connection in psutil.net_connections(kind="tcp") if connection.laddr}
    for _ in range(PORT_TRIES):
        first = random.randrange(*PORT_RANGE)
        if taken.isdisjoint(range(first, first + count)):
            return first
    raise ConfigError(f"no {count} consecutive free TCP ports in {PORT_TRIES} tries", field="ingress")


def _tell(folder: Path, line: str) -> None:
    with (folder / "progress").open("a", encoding="utf-8") as progress:
        progress.write(line + "\n")


def _write(folder: Path, **state: Any) -> None:
    """Replaces the state file at once, so that a reader never sees half of it."""
    temporary = folder / "state.json.tmp"
    temporary.write_text(json.dumps({"pid": os.getpid(), **state}), encoding="utf-8")
    temporary.rename(folder / "state.json")


if __name__ == "__main__":
    sys.exit(main())
