"""Clients as users have them, through the real ingress: ours, those of docs/clients.md, and gRPC's finer points."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.client import AsyncClient, Client
from baton.errors import DeadlineExceeded, InvalidRequest, NotFound, Overloaded
from baton.request import FinishReason
from baton.wire import inference_pb2 as pb
from router.health import MOST_WATCHES

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
NODE_MODULES = os.environ.get("NODE_PATH", str(ROOT / "node_modules"))
BLOCKS = re.findall(r"^```(python|sh|js)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
# What each block of the page prints, in its order.
SAID = ["Paris", "Paris", "sampling.temperature is wrong", "Paris", "Paris", "Paris", "Paris"]


@pytest.fixture
def client(nixl_cluster: Any) -> Iterator[Client]:
    with Client(nixl_cluster.address) as client:
        yield client


def node_or_skip() -> None:
    if shutil.which("node") is None:
        pytest.skip("needs Node")
    if not (Path(NODE_MODULES) / "@grpc" / "grpc-js").is_dir():
        pytest.skip("needs `npm install @grpc/grpc-js @grpc/proto-loader`, here or where NODE_PATH says")


def command(language: str, code: str) -> list[str]:
    match language:
        case "python":
            return [sys.executable, "-c", code]
        case "sh":
            return ["bash", "-c", code]
        case _:
            return ["node", "--input-type=commonjs", "-e", code]


@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=[f"{i}-{kind}" for i, (kind, _) in enumerate(BLOCKS)])
def test_the_examples_of_the_page_run(nixl_cluster: Any, number: int) -> None:
    assert len(BLOCKS) == len(SAID)
    language, code = BLOCKS[number]
    if language == "js":
        node_or_skip()
    here = code.replace("127.0.0.1:9000", nixl_cluster.address).replace("127.0.0.1:8000", nixl_cluster.http)
    assert here != code
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NODE_PATH": NODE_MODULES, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command(language, here),
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert SAID[number] in done.stdout, (done.stdout, done.stderr)


def test_our_client_gets_what_the_stub_gets(nixl_cluster: Any, client: Client) -> None:
    how: dict[str, Any] = {
        "temperature": 0.0,
        "max_tokens": 12,
        "logprobs": True,
        "top_logprobs": 2,
        "ignore_eos": True,
    }
    plain = nixl_cluster.generate(prompt="The capital of France is", sampling=pb.Sampling(**how))
    whole = client.generate("The capital of France is", request_id="mine-1", **how)
    assert (whole.text, list(whole.outputs[0].token_ids)) == (plain.text, plain.tokens)
    assert (whole.request_id, whole.finish, whole.usage.completion_tokens) == ("mine-1", FinishReason.LENGTH, 12)
    assert len(whole.outputs[0].logprobs) == 12
    assert all(len(one.top) == 2 for one in whole.outputs[0].logprobs)
    assert sum(whole.ledger.stages.values()) == pytest.approx(whole.ledger.total_s, rel=1e-6)
    two = client.generate("The capital of France is", n=2, seed=5, max_tokens=4)
    alone = client.generate("The capital of France is", seed=6, max_tokens=4)
    assert two.outputs[1].text == alone.text


def test_errors_keep_field_and_reason_through_the_ingress(client: Client) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        client.generate("Hello", top_p=7.0)
    assert wrong.value.field == "sampling.top_p"
    with pytest.raises(NotFound) as unknown:
        client.generate("Hello", model="gpt-17")
    assert unknown.value.field == "model"
    with pytest.raises(NotFound):
        client.health("nobody")
    start_s = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        client.generate("Count to a thousand:", max_tokens=1500, ignore_eos=True, timeout_s=0.5)
    assert time.monotonic() - start_s < 2.0


def test_more_than_a_message_may_hold_is_refused_at_once(nixl_cluster: Any, client: Client) -> None:
    start_s = time.monotonic()
    with pytest.raises((Overloaded, InvalidRequest)):
        client.generate("x" * (12 << 20), max_tokens=1)
    assert time.monotonic() - start_s < 5.0
    assert client.generate("Hello", max_tokens=1).outputs[0].token_ids
    nixl_cluster.wait_idle()


def test_streams_left_behind_free_everything(nixl_cluster: Any, client: Client) -> None:
    for _ in range(5):
        with closing(client.stream("Once upon a time", max_tokens=900, ignore_eos=True)) as parts:
            next(parts)

    async def leave() -> None:
        async with AsyncClient(nixl_cluster.address) as other:
            for _ in range(5):
                async with aclosing(other.stream("Once upon a time", max_tokens=900, ignore_eos=True)) as parts:
                    await anext(parts)
            task = asyncio.create_task(other.generate("Once upon a time", max_tokens=900, ignore_eos=True))
            await asyncio.sleep(0.3)
            task.cancel()
            await asyncio.wait([task])

    asyncio.run(leave())
    nixl_cluster.wait_idle(timeout_s=5.0)


def test_pings_are_answered_while_a_stream_is_quiet(nixl_cluster: Any) -> None:
    """Ten pings a second on a stream without a byte: the ingress must not take them for an attack."""
    options = [
        ("grpc.keepalive_time_ms", 100), ("grpc.keepalive_timeout_ms", 2000), ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]  # fmt: skip
    with grpc.insecure_channel(nixl_cluster.address, options=options) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=5)
        assert next(iter(watch)).status == health_pb2.HealthCheckResponse.SERVING
        quiet = threading.Event()
        watch.add_callback(quiet.set)
        assert not quiet.wait(3.0), watch.details()
        watch.cancel()


def test_watches_of_health_take_nobodys_place(nixl_cluster: Any, client: Client) -> None:
    """They need no key and last, and one connection may carry a thousand streams."""

    def first(watch: Any) -> grpc.StatusCode:
        try:
            assert next(iter(watch)).status == health_pb2.HealthCheckResponse.SERVING
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    with grpc.insecure_channel(nixl_cluster.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=60) for _ in range(MOST_WATCHES + 6)]
        with ThreadPoolExecutor(len(watches)) as pool:
            codes = Counter(pool.map(first, watches))
        assert codes == {grpc.StatusCode.OK: MOST_WATCHES, grpc.StatusCode.RESOURCE_EXHAUSTED: 6}
        assert client.generate("Hello", max_tokens=1).outputs[0].token_ids
    deadline_s = time.monotonic() + 10
    with grpc.insecure_channel(nixl_cluster.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while first(stub.Watch(health_pb2.HealthCheckRequest(), timeout=5)) is not grpc.StatusCode.OK:
            assert time.monotonic() < deadline_s, "watches whose clients left still count"
            time.sleep(0.1)


class Crossing:
    """A TCP relay before ``address`` that counts what crosses. Use ``with``."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent = self.received = 0  # bytes, as the client sees them
        self._sockets = [self._listener]

    def __enter__(self) -> Crossing:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, far = self._listener.accept()[0], socket.create_connection(self._target, timeout=10)
                far.settimeout(None)
                self._sockets += [near, far]
                for ends, name in (((near, far), "sent"), ((far, near), "received")):
                    threading.Thread(target=self._copy, args=(*ends, name), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, name: str) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                setattr(self, name, getattr(self, name) + len(data))
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def test_compression_both_ways(nixl_cluster: Any) -> None:
    """Bytes are counted before the ingress: it passes compressed messages on as they are."""
    text = "one two three four " * 400
    how: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8, "logprobs": True, "top_logprobs": 20}
    crossed = []
    for compress in (False, True):
        with Crossing(nixl_cluster.address) as link, Client(link.address, compress=compress) as client:
            ids = client.tokenize(text)
            asked = link.sent, link.received
            output = client.generate(ids[:300], **how).outputs[0]
            crossed.append((asked, link.received - asked[1], ids, output.text, output.logprobs))
    plain, gzipped = crossed
    assert gzipped[2:] == plain[2:]
    assert plain[0][0] > len(text)
    assert gzipped[0][0] < len(text) / 3
    assert gzipped[0][1] < plain[0][1] / 3
    assert gzipped[1] < 0.95 * plain[1], "short messages, each compressed by itself: 3,404 bytes of 3,975 once"


def test_reflection_names_every_service(nixl_cluster: Any) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(nixl_cluster.channel)
    (answer,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10)
    services = {service.name for service in answer.list_services_response.service}
    assert {"baton.v1.Inference", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= services


def test_many_clients_at_once(nixl_cluster: Any, client: Client) -> None:
    """Threads share one connection, and each gets its own answer."""
    alone = [client.generate(f"{i}, {i + 1}, {i + 2},", temperature=0.0, max_tokens=6).text for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = pool.map(
            lambda i: client.generate(f"{i}, {i + 1}, {i + 2},", temperature=0.0, max_tokens=6), range(8)
        )
        assert [answer.text for answer in together] == alone
