"""The application on a Ray cluster that runs already: examine its nodes, deploy, take it away again.

Nothing of Ray is started or ended here, and other applications of the cluster's Serve are left alone.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from baton.config import Config
from baton.errors import ConfigError, Unavailable
from deploy import ingress, serve_config

CONNECT_S = 5.0
PROBE_S = 60.0  # a worker process starts for it on every node
NOT_INSTALLED = ""
FRONT = "RAY_SERVE_HAPROXY_BINARY_PATH"  # that of deploy.ingress: without it the front has no defences

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Node:
    """What a process that Ray started on one node finds there."""

    host: str
    baton: str  # version, or NOT_INSTALLED
    environment: Mapping[str, str | None]
    unreadable: tuple[str, ...] = ()  # keys of the configuration that name files which are not there for it


def up(config: Config, address: str, *, progress: Progress) -> None:
    """Deploys on the Ray at ``address`` (``host:port``, ``auto`` or ``ray://``), and returns when every replica runs.

    Raises :class:`Unavailable` when there is no Ray, a node cannot run the application, or it does not come up, and
    :class:`ConfigError` when a Serve that runs there listens elsewhere than the configuration says.
    """
    ingress.check_exposure(config)
    with _joined(address):
        running = _serve_details()
        if running is not None:
            require_same_ingress(running, serve_config.serve_config(config))
        environment = serve_config.environment(config)
        nodes = _probe([*environment, FRONT], files(config))
        wrong = faults(nodes, environment, importlib.metadata.version("baton"))
        if wrong:
            raise Unavailable("; ".join(wrong))
        progress(f"{len(nodes)} nodes can run it; loading the model in every worker")
        from deploy.supervisor import start_serve

        try:
            start_serve(serve_config.serve_config(config))
        except RuntimeError as error:  # Serve says so of an application that does not come up
            raise Unavailable(f"{config.name} does not come up: {error}") from error


def down(name: str, address: str) -> bool:
    """Takes the application off the Ray at ``address``; False when it has none of this name."""
    with _joined(address):
        from ray import serve

        if name not in serve.status().applications:
            return False
        serve.delete(name)
        return True


def files(config: Config) -> dict[str, str]:
    """Paths that the configuration names, by key: the nodes must have them, whatever is on this machine."""
    security, tls = config.security, config.ingress.tls
    named = {
        "security.cluster_key_file": security.cluster_key_file,
        "security.api_keys_file": security.api_keys_file,
        "ingress.tls.cert": tls.cert,
        "ingress.tls.key": tls.key,
        "ingress.tls.client_ca": tls.client_ca,
    }
    return {key: path for key, path in named.items() if path}


def require_same_ingress(running: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Serve keeps the ingress that it was started with; raises :class:`ConfigError` where ``wanted`` is another. Pure.

    Both as ``serve deploy`` and Serve's own details have them.
    """
    http, grpc = running.get("http_options") or {}, running.get("grpc_options") or {}
    found = (
        ("ingress.host", http.get("host"), wanted["http_options"]["host"]),
        ("ingress.http_port", http.get("port"), wanted["http_options"]["port"]),
        ("ingress.grpc_port", grpc.get("port"), wanted["grpc_options"]["port"]),
    )
    for key, now, asked in found:
        if now != asked:
            raise ConfigError(
                f"is {asked}, and the Serve that runs there keeps {now}: set that, or end it with `serve shutdown`",
                field=key,
            )
    if missing := set(wanted["grpc_options"]["grpc_servicer_functions"]) - set(grpc["grpc_servicer_functions"]):
        raise ConfigError(
            f"the Serve that runs there was started without {', '.join(sorted(missing))}: end it with `serve shutdown`",
            field="ingress",
        )


def faults(nodes: list[Node], environment: Mapping[str, str], version: str) -> list[str]:
    """Why the application cannot run on ``nodes``, one sentence each, with what mends it. Pure."""
    wrong = []
    for node in nodes:
        if node.baton != version:
            found = "is not installed" if node.baton == NOT_INSTALLED else f"has version {node.baton}"
            wrong.append(f"Baton {found} on {node.host}, {version} is needed: install it there")
        if node.unreadable:
            wrong.append(f"{node.host} cannot read the files that {', '.join(node.unreadable)} name: put them there")
        other = [name for name, value in environment.items() if node.environment.get(name) != value]
        other += [] if node.environment.get(FRONT) else [FRONT]
        if other:
            wrong.append(
                f"Ray on {node.host} was started without {', '.join(other)}: "
                'start it there after `eval "$(baton config env --config FILE --front FOLDER)"`'
            )
    return wrong


@contextlib.contextmanager
def _joined(address: str) -> Iterator[None]:
    import ray

    _require_answer(address)
    try:
        ray.init(address=address, namespace="serve", log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise Unavailable(f"no Ray answers at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Ray itself would go on trying for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto": Ray looks for its own session's files
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as error:
        raise Unavailable(f"no Ray answers at {address}: {error}") from error


def _serve_details() -> dict[str, Any] | None:
    """What Serve says of itself; None where none runs."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else dict(client.get_serve_details())


def _probe(names: list[str], paths: Mapping[str, str]) -> list[Node]:
    """Every live node, as a process of Ray sees it there: versions, environment, and files by key."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Nested, so that it travels as code: Baton may be missing there.
    def look() -> tuple[str, dict[str, str | None], tuple[str, ...]]:
        try:
            found = importlib.metadata.version("baton")
        except importlib.metadata.PackageNotFoundError:
            found = ""
        lost = tuple(key for key, path in paths.items() if not os.access(os.path.expanduser(path), os.R_OK))
        return found, {name: os.environ.get(name) for name in names}, lost

    alive = [node for node in ray.nodes() if node["Alive"]]
    remote = ray.remote(num_cpus=0)(look)
    answers = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in alive
    ]
    try:
        found = ray.get(answers, timeout=PROBE_S)
    except ray.exceptions.GetTimeoutError:
        raise Unavailable(f"Ray's nodes did not answer within {PROBE_S:g} s") from None
    return [Node(node["NodeManagerAddress"], *answer) for node, answer in zip(alive, found, strict=True)]
