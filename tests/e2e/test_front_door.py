"""The front door of real clusters: one with TLS, client certificates and API keys; attacks on one without."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx2
import openai
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.api_keys import ApiKey, Keyring, TenantLimits, issue
from baton.client import AsyncClient, Tls
from baton.client import Client as OurClient
from baton.errors import Forbidden, Unauthenticated, Unavailable
from baton.wire import inference_pb2 as pb
from baton.wire import inference_pb2_grpc

if TYPE_CHECKING:
    from tests.conftest import Signed
    from tests.e2e.conftest import Client

pytestmark = pytest.mark.ray

MODEL = "smollm2-135m-instruct"
TODAY = "2026-01-31"
ROOT = Path(__file__).resolve().parents[2]


class Door:
    """A cluster behind mutual TLS and keys, and what to open it with."""

    def __init__(self, folder: Path, signed: Callable[[str], Signed]) -> None:
        servers, clients, strangers = signed("servers"), signed("clients"), signed("strangers")
        self.ca, self.cert = servers.ca, servers.pair("front")
        self.client_ca, self.pair = clients.ca, clients.pair("client")
        self.strangers_pair = strangers.pair("client")
        self.file, self.kept = folder / "keys", list[ApiKey]()
        self.operator = self.add("ops", operator=True)
        self.tenant = self.add("acme")
        self.cluster: Client

    def add(self, tenant: str, **details: Any) -> str:
        """A new key, in the file."""
        text, kept = issue(tenant, created=TODAY, **details)
        self.kept.append(kept)
        self.write()
        return text

    def write(self) -> None:
        self.file.write_text(Keyring(self.kept).text())

    def tls(self, pair: tuple[str, str] | None = None) -> Tls:
        cert, key = pair or self.pair
        return Tls(ca=self.ca, cert=cert, key=key)

    def client(self, key: str) -> OurClient:
        return OurClient(self.cluster.address, api_key=key, tls=self.tls())

    def context(self, pair: tuple[str, str] | None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca)
        if pair:
            context.load_cert_chain(*pair)
        return context

    def http(self, key: str) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = f"https://{self.cluster.http}"
        return httpx2.Client(base_url=url, verify=self.context(self.pair), headers=headers, timeout=60)


@pytest.fixture(scope="module")
def door(
    start_cluster: Callable[..., Any], signed: Callable[[str], Signed], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Door]:
    door = Door(tmp_path_factory.mktemp("door"), signed)
    mutual = door.tls().credentials()
    operator = grpc.composite_channel_credentials(mutual, grpc.access_token_call_credentials(door.operator))
    with start_cluster(
        "door",
        credentials=operator,
        prefill={"replicas": 0},
        decode={"kv_tokens": 4096},
        ingress={"tls": {"cert": door.cert[0], "key": door.cert[1], "client_ca": door.client_ca}},
        security={"api_keys_file": str(door.file)},
    ) as door.cluster:
        yield door


def test_every_client_gets_its_answer(door: Door) -> None:
    with door.client(door.tenant) as client:
        answer = client.generate("The capital of France is", max_tokens=6, temperature=0.0)
    context = door.context(door.pair)
    with openai.OpenAI(
        base_url=f"https://{door.cluster.http}/v1", api_key=door.tenant, max_retries=0,
        http_client=httpx2.Client(verify=context, timeout=60),
    ) as client:  # fmt: skip
        whole = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=6, temperature=0)
        events = client.completions.create(
            model=MODEL, prompt="The capital of France is", max_tokens=6, temperature=0, stream=True
        )
        assert whole.choices[0].text == answer.text == "".join(event.choices[0].text for event in events)
    files = [
        "--cacert",
        door.ca,
        "--cert",
        door.pair[0],
        "--key",
        door.pair[1],
        "-H",
        f"Authorization: Bearer {door.tenant}",
    ]
    told = subprocess.run(
        ["curl", "-sS", *files, f"https://{door.cluster.http}/v1/models"], capture_output=True, timeout=30, check=True
    )
    assert json.loads(told.stdout)["data"][0]["id"] == MODEL
    done = subprocess.run(
        [
            sys.executable, "-m", "deploy.cli", "generate", "--raw", "The capital of France is",
            "--address", door.cluster.address, "--max-tokens", "6", "--temperature", "0",
            "--tls-ca", door.ca, "--tls-cert", door.pair[0], "--tls-key", door.pair[1],
        ],
        capture_output=True, text=True, timeout=60, cwd=ROOT, check=False,
        env={**os.environ, "BATON_API_KEY": door.tenant},
    )  # fmt: skip
    assert done.stdout.strip() == answer.text.strip(), done.stderr
    door.cluster.wait_idle()


async def test_the_asynchronous_client_too(door: Door) -> None:
    async with AsyncClient(door.cluster.address, api_key=door.tenant, tls=door.tls()) as client:
        assert (await client.generate("Hello", max_tokens=2)).text
    async with AsyncClient(door.cluster.address, api_key="bt-nothing", tls=door.tls()) as client:
        with pytest.raises(Unauthenticated):
            await client.generate("Hello", max_tokens=2)


def test_without_a_certificate_nobody_gets_as_far_as_a_key(door: Door) -> None:
    for pair in (None, door.strangers_pair):
        with httpx2.Client(verify=door.context(pair), timeout=10) as client, pytest.raises(httpx2.TransportError):
            client.get(f"https://{door.cluster.http}/health")
        tls = Tls(ca=door.ca) if pair is None else door.tls(pair)
        with OurClient(door.cluster.address, api_key=door.tenant, tls=tls) as client, pytest.raises(Unavailable):
            client.generate("Hello", max_tokens=1, timeout_s=5.0)
    with OurClient(door.cluster.address, api_key=door.tenant) as client, pytest.raises(Unavailable):
        client.generate("Hello", max_tokens=1, timeout_s=5.0)


def test_without_a_key_only_health_answers(door: Door) -> None:
    body = {"prompt": "Hello", "max_tokens": 1}
    with door.http("") as nobody, door.http("bt-AAAAAAAA-" + "a" * 43) as wrong:
        assert nobody.get("/health").json() == {"ready": True}
        for client in (nobody, wrong):
            for method, path in (
                ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/tokenize"),
                ("POST", "/v1/embeddings"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/openapi.json"),
            ):  # fmt: skip
                answer = client.request(method, path, json=body if method == "POST" else None)
                assert answer.status_code == 401, path
                assert answer.headers["www-authenticate"] == "Bearer"
                error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    with pytest.raises(openai.AuthenticationError) as refused, openai.OpenAI(
        base_url=f"https://{door.cluster.http}/v1", api_key="wrong", max_retries=0,
        http_client=httpx2.Client(verify=door.context(door.pair)),
    ) as strange:  # fmt: skip
        strange.models.list()
    assert refused.value.code == "invalid_api_key"
    channel = grpc.secure_channel(door.cluster.address, door.tls().credentials())
    with channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=10).status == 1
        calls: list[Callable[[], Any]] = [
            lambda: list(stub.Generate(pb.GenerateRequest(prompt="Hello"), timeout=10)),
            lambda: stub.Tokenize(pb.TokenizeRequest(prompt="Hello"), timeout=10),
            lambda: stub.Detokenize(pb.DetokenizeRequest(token_ids=[1]), timeout=10),
            lambda: stub.ListModels(pb.ListModelsRequest(), timeout=10),
            lambda: stub.GetStatus(pb.GetStatusRequest(), timeout=10),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as error:
                call()
            assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_what_concerns_all_is_for_operators(door: Door) -> None:
    with door.http(door.tenant) as tenant, door.http(door.operator) as operator:
        assert tenant.get("/metrics").status_code == 403
        assert tenant.get("/metrics").json()["error"]["code"] == "insufficient_permissions"
        assert "baton_" in operator.get("/metrics").text
    with door.client(door.tenant) as client, pytest.raises(Forbidden):
        client.status()


def test_keys_come_and_go_while_the_service_runs(door: Door) -> None:
    text = door.add("new")
    with door.client(text) as client:
        _until(lambda: client.generate("Hello", max_tokens=1).outputs, Unauthenticated)
        door.kept = [kept for kept in door.kept if kept.tenant != "new"]
        door.write()

        def refused() -> None:
            with pytest.raises(Unauthenticated, match="revoked"):
                client.generate("Hello", max_tokens=1)

        _until(refused, pytest.fail.Exception)


def test_a_tenants_limit_is_its_own(door: Door) -> None:
    limited = door.add("small", limits=TenantLimits(requests_per_minute=2))
    with door.client(limited) as client:
        _until(client.models, Unauthenticated)
    with door.http(limited) as client:
        answers = [client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 1}) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    error = answers[-1].json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert 0 < int(answers[-1].headers["retry-after"]) <= 60
    with door.client(door.tenant) as client:
        assert client.generate("Hello", max_tokens=1).outputs


def test_nobody_walks_around_the_ingress(door: Door) -> None:
    """Routers' own ports answer only what HAProxy hands them, whatever key is shown."""
    (config,) = (_scratch(door.cluster, "door") / "h").rglob("haproxy*.cfg")
    assert config.read_text().startswith("# hardened")
    ports = [int(port) for port in re.findall(r"^\s+server \S+ \S+:(\d+) proto h2", config.read_text(), re.MULTILINE)]
    assert ports
    for port in ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            metadata = (("authorization", f"Bearer {door.operator}"), ("x-baton-front", "0" * 64))
            with pytest.raises(grpc.RpcError) as error:
                stub.GetStatus(pb.GetStatusRequest(), timeout=10, metadata=metadata)
            assert error.value.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED)
    door.cluster.wait_idle()


def _scratch(cluster: Any, name: str) -> Path:
    return Path((Path(cluster.home) / "clusters" / name / "scratch").read_text())


def test_no_key_is_in_any_file_or_command_line(door: Door) -> None:
    folder = Path(door.cluster.home) / "clusters" / "door"
    files = [path for root in (folder, _scratch(door.cluster, "door")) for path in root.rglob("*") if path.is_file()]
    assert len(files) > 10
    for key in (door.tenant, door.operator):
        secret = key.split("-", 2)[2].encode()
        for path in files:
            assert path.stat().st_size > 64 << 20 or secret not in path.read_bytes(), path
        for process in psutil.process_iter(["cmdline"]):
            assert secret.decode() not in " ".join(process.info["cmdline"] or [])


def _until(attempt: Callable[[], Any], not_yet: type[BaseException]) -> None:
    """Once ``attempt`` succeeds; routers look at the keys once a second."""
    deadline_s = time.monotonic() + 10.0
    while True:
        try:
            attempt()
            return
        except not_yet:
            assert time.monotonic() < deadline_s
            time.sleep(0.2)


# ---- without keys and TLS, as on a laptop: attacks on an ordinary cluster

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
DRIPS: dict[str, tuple[str, bytes, bytes]] = {  # what is sent at once, and then again and again
    "slow headers": ("http", b"POST /v1/completions HTTP/1.1\r\n", b"a: b\r\n"),
    "slow body": ("http", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 4000000\r\n"
                  b"content-type: application/json\r\n\r\n", b" "),
    "header bomb": ("http", b"POST /v1/completions HTTP/1.1\r\nbomb: ", b"a" * 65536),
    "pings": ("grpc", PREFACE, b"\0\0\x08\6\0\0\0\0\0" + b"12345678"),
}  # fmt: skip
BOUND_S = {"slow headers": 14.0, "header bomb": 3.0, "pings": 14.0}  # ingress.header_s is 10


def test_attackers_neither_stop_nor_slow_the_others(tcp_cluster: Client) -> None:
    """400 connections that dawdle or flood; meanwhile every honest request is answered, and they are cut in time."""
    lasted: dict[str, list[float]] = {name: [] for name in DRIPS}
    done = threading.Event()

    def attack(name: str) -> None:
        which, opening, drip = DRIPS[name]
        host, _, port = (tcp_cluster.http if which == "http" else tcp_cluster.address).rpartition(":")
        began = time.monotonic()
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.settimeout(0.5)
            try:
                sock.sendall(opening)
                while not done.is_set():
                    sock.sendall(drip)
                    try:
                        if not sock.recv(65536):
                            break
                    except TimeoutError:
                        continue
            except OSError:
                pass
        lasted[name].append(time.monotonic() - began)

    answers = []
    with ThreadPoolExecutor(400) as crowd:
        attacks = [crowd.submit(attack, name) for name in DRIPS for _ in range(100)]
        try:
            until_s = time.monotonic() + 15.0
            while time.monotonic() < until_s:
                began = time.monotonic()
                reply = tcp_cluster.generate(prompt="Hello", sampling=pb.Sampling(temperature=0.0, max_tokens=4))
                assert len(reply.tokens) == 4
                health = httpx2.get(f"http://{tcp_cluster.http}/health", timeout=10)
                assert health.status_code == 200
                answers.append(time.monotonic() - began)
        finally:
            done.set()
        for each in attacks:
            each.result()
    assert len(answers) >= 5
    assert max(answers) < 5.0
    for name, bound_s in BOUND_S.items():
        assert max(lasted[name]) < bound_s, name
    tcp_cluster.wait_idle()


def test_what_is_too_large_costs_no_memory(tcp_cluster: Client) -> None:
    """Also when it is small on the wire: 200 MB of zeros are 200 KB with gzip."""
    routers = [
        process for process in psutil.process_iter(["cmdline"]) if "router" in " ".join(process.info["cmdline"] or [])
    ]
    call = tcp_cluster.channel.unary_stream("/baton.v1.Inference/Generate")
    before = {process.pid: process.memory_info().rss for process in routers if process.is_running()}
    for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as refused:
                list(call(b"\x12" + bytes(90 << 20), timeout=60, compression=compression))
            assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    grown = [process.memory_info().rss - before[process.pid] for process in routers if process.is_running()]
    assert max(grown, default=0) < 200 << 20
    assert tcp_cluster.generate(prompt="Hello", sampling=pb.Sampling(max_tokens=1)).tokens


TRAVERSALS = ["../../etc/passwd", "/etc/passwd", "..", "~/.cache", "a/../../b", "file:///etc/passwd", "x" * 300, "a\0b"]


@pytest.mark.parametrize("model", TRAVERSALS)
def test_a_models_name_opens_no_file(tcp_cluster: Client, model: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        tcp_cluster.generate(model=model, prompt="Hello")
    assert refused.value.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)
    answer = httpx2.post(f"http://{tcp_cluster.http}/v1/completions", json={"model": model, "prompt": "x"}, timeout=10)
    assert answer.status_code in (400, 404)
    assert "root:" not in answer.text


def test_a_prompt_that_is_too_long_says_so_in_openais_words(tcp_cluster: Client) -> None:
    with openai.OpenAI(base_url=f"http://{tcp_cluster.http}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model=MODEL, prompt=[504] * 3000)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as much:
            client.completions.create(model=MODEL, prompt="Hello", max_tokens=100_000)
        assert (much.value.code, much.value.param) == ("context_length_exceeded", "max_tokens")
