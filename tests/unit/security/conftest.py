"""Ray's own HAProxy configuration, hardened, in front of two small servers: one speaks HTTP, the other gRPC."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.config import parse
from deploy import ingress
from deploy.supervisor import free_ports

HOST = "127.0.0.1"
SEEN: list[str] = []  # of the running front


class Web(http.server.BaseHTTPRequestHandler):
    """Answers with what it received, a second later where the path says so."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        if self.path != "/-/healthz":  # HAProxy's own check comes when it likes
            SEEN.append(self.headers.get(ingress.FRONT_HEADER, ""))
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        time.sleep(2.5 if self.path == "/late" else 0.0)
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _echo(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    SEEN.append(str(dict(context.invocation_metadata()).get(ingress.FRONT_HEADER, "")))
    yield request
    time.sleep(2.5 if request == b"late" else 0.0)
    yield request


@dataclass(frozen=True)
class Front:
    """A running HAProxy's ports, and how it was started."""

    http_port: int
    grpc_port: int
    folder: Path
    process: subprocess.Popen[bytes]
    seen: list[str]  # the front header, as servers behind the ingress received it

    def grpc(self, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
        address = f"{HOST}:{self.grpc_port}"
        return grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)


StartFront = Callable[..., contextlib.AbstractContextManager[Front]]


@pytest.fixture(scope="session")
def behind() -> Iterator[tuple[int, int]]:
    """Ports of the two servers, HTTP and gRPC."""
    web = http.server.ThreadingHTTPServer((HOST, 0), Web)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, daemon=True).start()
    server = grpc.server(futures.ThreadPoolExecutor(16))
    generate = {"Generate": grpc.unary_stream_rpc_method_handler(_echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("baton.v1.Inference", generate),))
    port = server.add_insecure_port(f"{HOST}:0")
    server.start()
    yield web.server_address[1], port
    web.shutdown()
    web.server_close()
    server.stop(None).wait()


RENDER = """
import sys
from pathlib import Path
from ray.serve._private import haproxy
from ray.serve._private.common import RequestProtocol
from ray.serve.config import HTTPOptions, gRPCOptions

folder = Path(sys.argv[1])
config = haproxy.HAProxyConfig(
    socket_path="FOLDER/admin.sock", server_state_base="FOLDER", server_state_file="FOLDER/state",
    metrics_port=10003, stats_port=10004, metrics_socket_path="FOLDER/m.sock",
    has_received_routes=True, has_received_servers=True,
    http_options=HTTPOptions(host="127.0.0.1", port=10001),
    grpc_options=gRPCOptions(
        port=10002, grpc_servicer_functions=["grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server"]
    ),
)
backends = {
    name: haproxy.BackendConfig(
        name=name, path_prefix="/", app_name="app", protocol=protocol,
        servers=[haproxy.ServerConfig(name=f"{name}-1", host="127.0.0.1", port=port)],
    )
    for name, protocol, port in (("web", RequestProtocol.HTTP, 10005), ("rpc", RequestProtocol.GRPC, 10006))
}
haproxy.HAProxyApi(config, backends, str(folder / "haproxy.cfg"))._generate_config_file_internal()
"""


@pytest.fixture(scope="session")
def written_by_ray(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What this version of Ray writes for one application, with ports from 10001 and a folder called FOLDER.

    In a process of its own: Ray's imports warn.
    """
    folder = tmp_path_factory.mktemp("ray")
    environment = {**os.environ, "RAY_SERVE_ENABLE_HA_PROXY": "1"}
    subprocess.run([sys.executable, "-c", RENDER, str(folder)], check=True, timeout=60, cwd=folder, env=environment)
    text = (folder / "haproxy.cfg").read_text()
    assert " check " in text
    return re.sub(r" check observe .*", "", text)  # the servers here answer no checks


@pytest.fixture
def start_front(behind: tuple[int, int], written_by_ray: str) -> StartFront:
    """A function that starts the real HAProxy with Ray's configuration through Baton's script."""

    @contextlib.contextmanager
    def start(passage: str = "", **keys: Any) -> Iterator[Front]:
        folder = Path(tempfile.mkdtemp(prefix="bf-", dir="/tmp"))  # sockets' paths are short
        first = free_ports(4)
        config = parse({"ingress": {"http_port": first, "grpc_port": first + 1, **keys}})
        environment = ingress.install(config, folder, passage)
        path, ports = folder / "haproxy.cfg", (first, first + 1, first + 2, first + 3, *behind)
        text = written_by_ray.replace("FOLDER", str(folder))
        for number, port in enumerate(ports, 10001):
            text = text.replace(f":{number}", f":{port}")
        path.write_text(text)
        command = [environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(path), "-dR"]
        with (folder / "err").open("wb") as errors:
            process = subprocess.Popen(command, stdout=errors, stderr=errors)
        try:
            deadline_s = time.monotonic() + 20.0
            while not (folder / "admin.sock").exists():
                assert process.poll() is None, (folder / "err").read_text()
                assert time.monotonic() < deadline_s
                time.sleep(0.02)
            SEEN.clear()
            yield Front(first, first + 1, folder, process, SEEN)
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(folder)

    return start
