"""Two routers: one is killed under its streams, and at the end both go in order."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.wire import inference_pb2 as pb

pytestmark = [pytest.mark.ray, pytest.mark.slow]  # a cluster of its own: half a minute

NAME = "routers"
STREAMS = 8
TOKENS = 60
AT_ONCE_S = 2.0  # EOF is noticed in milliseconds; the machine is busy
BACK_S = 60.0
DRAIN_S = 40.0


class Collector(ThreadingHTTPServer):
    """Takes OpenTelemetry's exports."""

    def __init__(self) -> None:
        bodies: list[bytes] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                bodies.append(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies = bodies
        threading.Thread(target=self.serve_forever, daemon=True).start()


@dataclass
class Routers:
    """The cluster, and what ends it."""

    client: Any
    collector: Collector
    end: contextlib.ExitStack


@pytest.fixture(scope="module")
def routers(start_cluster: Callable[..., Any]) -> Iterator[Routers]:
    with Collector() as collector, contextlib.ExitStack() as end, pytest.MonkeyPatch.context() as patch:
        end.callback(collector.shutdown)
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        patch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")  # only who closes sends
        cluster = start_cluster(
            NAME,
            prefill={"replicas": 0},
            decode={"kv_tokens": 8192},
            router={"replicas": 2, "drain_s": DRAIN_S},
            observe={"traces": True},
        )
        client = end.enter_context(cluster)
        _until(lambda: len(processes()) == 2)
        yield Routers(client, collector, end)


def processes() -> dict[int, psutil.Process]:
    """The routers, by process id."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        if f"ServeReplica:{NAME}:router" in " ".join(process.info["cmdline"] or []):
            found[process.pid] = process
    return found


@dataclass
class Stream:
    """What one client saw."""

    tokens: list[int] = field(default_factory=list)
    status: str = "OK"
    ended_s: float = 0.0


def start(client: Any, seen: Callable[[int], object]) -> list[Any]:
    """All streams at once, as futures; ``seen`` is told how many tokens a stream has."""

    def run(index: int) -> Stream:
        stream = Stream()
        try:
            for chunk in client.stream(
                prompt=f"Story {index}: once upon a time",
                sampling=pb.Sampling(temperature=0.0, max_tokens=TOKENS, ignore_eos=True),
            ):
                stream.tokens += chunk.token_ids
                seen(len(stream.tokens))
        except grpc.RpcError as error:
            stream.status = error.code().name
        stream.ended_s = time.monotonic()
        return stream

    pool = ThreadPoolExecutor(STREAMS)
    futures = [pool.submit(run, index) for index in range(STREAMS)]
    pool.shutdown(wait=False)
    return futures


def test_every_scrape_tells_the_sums_of_both(routers: Routers) -> None:
    client = routers.client
    for _ in range(5):
        client.generate(prompt="Hello", sampling=pb.Sampling(max_tokens=2, temperature=0.0))
    _until(lambda: len(scraped(client, "baton_router_up")) == 2)  # Serve has told each router of the other
    for _ in range(6):  # HAProxy takes turns
        assert set(scraped(client, "baton_router_up").values()) == {1.0}
        completed = scraped(client, 'baton_router_requests_total{outcome="completed"')
        assert len(completed) == 2
        assert sum(completed.values()) == 5


def scraped(client: Any, name: str) -> dict[str, float]:
    """Samples that begin with ``name``, by router."""
    with urllib.request.urlopen(f"http://{client.http}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if line.startswith(name))
    return {series.partition('router="')[2].partition('"')[0]: float(value) for series, _, value in samples}


def test_a_killed_router_takes_its_own_streams_only(routers: Routers) -> None:
    client = routers.client
    undisturbed = [future.result().tokens for future in start(client, lambda _: None)]
    barrier = threading.Barrier(STREAMS + 1, timeout=60)
    streams = start(client, lambda tokens: barrier.wait() if tokens == 3 else None)
    barrier.wait()
    victim, *_ = processes()
    os.kill(victim, signal.SIGKILL)
    killed_s = time.monotonic()
    ended = [stream.result() for stream in streams]
    lost = [stream for stream in ended if stream.status != "OK"]
    assert 0 < len(lost) < STREAMS, "both had some"
    for stream, whole in zip(ended, undisturbed, strict=True):
        if stream.status == "OK":
            assert stream.tokens == whole
        else:
            assert stream.status in {"UNAVAILABLE", "CANCELLED"}  # docs/recovery.md
            assert stream.ended_s - killed_s < AT_ONCE_S
            assert stream.tokens == whole[: len(stream.tokens)]
    _until(lambda: len(processes()) == 2 and victim not in processes())
    client.wait_ready(0, 1, BACK_S)
    client.wait_idle()


def test_routers_that_go_send_their_last_spans_and_wait_for_no_watch(routers: Routers) -> None:
    for number in range(6):  # both routers get some
        routers.client.generate(prompt="Hello", request_id=f"last-{number}", sampling=pb.Sampling(max_tokens=2))
    assert not routers.collector.bodies
    with grpc.insecure_channel(routers.client.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=120)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        begun_s = time.monotonic()
        routers.end.pop_all().close()
        assert time.monotonic() - begun_s < DRAIN_S, "a watch holds a router for as long as it is allowed to"
        with pytest.raises(grpc.RpcError):
            next(watch)
    sent = b"".join(routers.collector.bodies)
    assert [number for number in range(6) if f"last-{number}".encode() not in sent] == []


def _until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + BACK_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
