"""A real gRPC server whose answers a test scripts, and certificates for it."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from baton.errors import BatonError
from baton.wire import inference_pb2 as pb
from baton.wire import inference_pb2_grpc
from router import status

LAST = pb.GenerateResponse(
    finish_reason=pb.FINISH_REASON_LENGTH,
    usage=pb.Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5),
    ledger=pb.StageLedger(
        total_s=0.5,
        stages=[pb.StageLedger.Stage(name="decode", seconds=0.5)],
        transfer_busy_s=0.25,
        transfer_bytes=4096,
        codec="raw",
        transport="tcp",
    ),
)


def first(token: int, text: str, **fields: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(request_id="r-1", model="m", token_ids=[token], text=text, **fields)


Step = pb.GenerateResponse | BatonError | float  # sent, raised, or slept for so many seconds


@dataclass
class Scripted(inference_pb2_grpc.InferenceServicer):  # type: ignore[misc]
    """Every call of Generate takes the next script; the last one is repeated. Notes what it saw."""

    scripts: list[list[Step]] = field(default_factory=list)
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    left_s: list[float] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self.times_s.append(time.monotonic())
        self.left_s.append(context.time_remaining())
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        context.add_callback(self.cancelled.set)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        for step in script:
            if isinstance(step, BatonError):
                status.set_on(context, step)
                return
            if isinstance(step, float):
                time.sleep(step)
            else:
                yield step

    def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:  # noqa: N802
        del context
        words = request.prompt.split() or [turn.content for turn in request.chat.messages]
        return pb.TokenizeResponse(token_ids=[len(word) for word in words])

    def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:  # noqa: N802
        del context
        return pb.DetokenizeResponse(text=" ".join(map(str, request.token_ids)))

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:  # noqa: N802
        del request, context
        model = pb.Model(id="m", max_context_tokens=2048, vocab_size=9, eos_token_ids=[1, 2], dtype="float32")
        return pb.ListModelsResponse(models=[model])

    def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:  # noqa: N802
        del request, context
        return pb.GetStatusResponse(model="m", transport="tcp")


@dataclass
class Server:
    """Where it listens, and its scripted service."""

    address: str
    service: Scripted


@contextmanager
def _serving(credentials: grpc.ServerCredentials | None = None) -> Iterator[Server]:
    service, healthy = Scripted([[first(1, "Hel"), first(2, "lo"), LAST]]), health.HealthServicer()
    healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    healthy.set("tired", health_pb2.HealthCheckResponse.NOT_SERVING)
    with ThreadPoolExecutor(8) as threads:
        server = grpc.server(threads)
        inference_pb2_grpc.add_InferenceServicer_to_server(service, server)
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        yield Server(f"127.0.0.1:{port}", service)
        server.stop(0).wait(5)


@pytest.fixture
def server() -> Iterator[Server]:
    with _serving() as served:
        yield served


@dataclass(frozen=True)
class Pki:
    """PEM files of an authority, and of a server and a client that it vouches for."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        return self.folder / f"{name}.pem"


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    folder = tmp_path_factory.mktemp("pki")
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    now = datetime.datetime.now(datetime.UTC)

    def write(name: str, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> None:
        names = [x509.DNSName("baton.test"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        (folder / f"{name}_cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}_key.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )

    write("ca", ca_name, ca_key, ca=True)
    for name in ("server", "client"):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        write(name, subject, ec.generate_private_key(ec.SECP256R1()), ca=False)
    return Pki(folder)


@pytest.fixture
def mtls_server(pki: Pki) -> Iterator[Server]:
    """Lets in only clients with a certificate of the authority."""
    pair = (pki.server_key.read_bytes(), pki.server_cert.read_bytes())
    credentials = grpc.ssl_server_credentials([pair], pki.ca_cert.read_bytes(), require_client_auth=True)
    with _serving(credentials) as served:
        yield served


@pytest.fixture
def responses() -> Callable[..., pb.GenerateResponse]:
    return first


@pytest.fixture
def last() -> pb.GenerateResponse:
    return LAST


class Relay:
    """Forwards one port to ``target``; ``silence`` stops forwarding without closing anything, as a dead link does."""

    def __init__(self, target: str, port: int = 0) -> None:
        self._target, self._port = target, port
        self.silence = threading.Event()
        self._sockets: list[socket.socket] = []

    def start(self) -> int:
        listening = socket.create_server(("127.0.0.1", self._port))
        self._sockets.append(listening)
        threading.Thread(target=self._accept, args=(listening,), daemon=True).start()
        return int(listening.getsockname()[1])

    def close(self) -> None:
        for one in self._sockets:
            one.close()

    def _accept(self, listening: socket.socket) -> None:
        host, _, port = self._target.rpartition(":")
        try:
            while True:
                near, _ = listening.accept()
                far = socket.create_connection((host, int(port)), timeout=5)
                far.settimeout(None)
                self._sockets += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=(one, other), daemon=True).start()
        except OSError:
            return

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if not self.silence.is_set():
                    sink.sendall(data)
        except OSError:
            return


@pytest.fixture
def relay_to() -> type[Relay]:
    return Relay
