"""Workers are killed and stopped under load: every stream is the one that it would have been, and nothing leaks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from baton.wire import inference_pb2 as pb

pytestmark = pytest.mark.ray

STREAMS = 8
TOKENS = 60
RECOVERY_S = 60.0


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., Any]) -> Iterator[Any]:
    with start_cluster(
        "kill",
        prefill={"replicas": 2, "kv_tokens": 4096},
        decode={"replicas": 2, "page_tokens": 32, "kv_tokens": 4096},
        router={"local_prefill": False},
    ) as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(cluster: Any) -> list[list[int]]:
    """Every stream's tokens without a fault."""
    return [answer.result() for answer in start(cluster, lambda *_: None)]


def workers(client: Any, role: str) -> dict[str, int]:
    """The processes of ``role`` by worker id: they listen on the token plane's ports."""
    pool = next(pool for pool in client.status().pools if pool.role == role)
    ids = {int(worker.address.rpartition(":")[2]): worker.id for worker in pool.workers}
    listening = [c for c in psutil.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN and c.pid]
    return {ids[c.laddr.port]: c.pid for c in listening if c.laddr.port in ids}


def busiest(client: Any, role: str) -> int:
    """The process of ``role`` that has most to do."""
    pool = next(pool for pool in client.status().pools if pool.role == role)
    worker = max(pool.workers, key=lambda worker: worker.load.running + worker.load.handoffs)
    return workers(client, role)[worker.id]


def start(client: Any, watch: Callable[[Any, int], None]) -> list[Any]:
    """All streams at once, as futures of their tokens; any error is raised by ``result``."""

    def run(index: int) -> list[int]:
        tokens: list[int] = []
        stream = client.stream(
            prompt=f"Story {index}: once upon a time " + "and then " * (20 * (index % 4)),
            sampling=pb.Sampling(temperature=0.0, max_tokens=TOKENS, ignore_eos=True),
            handoff=pb.Handoff(codec="lossless"),
        )
        for chunk in stream:
            tokens += chunk.token_ids
            watch(index, len(tokens))
        return tokens

    pool = ThreadPoolExecutor(STREAMS)
    futures = [pool.submit(run, index) for index in range(STREAMS)]
    pool.shutdown(wait=False)
    return futures


def when_all_stream() -> tuple[threading.Barrier, Callable[[int, int], None]]:
    """A barrier that opens when every stream has tokens, and what the streams call."""
    barrier = threading.Barrier(STREAMS + 1, timeout=60)

    def watch(index: int, tokens: int) -> None:
        if tokens == 3:
            barrier.wait()

    return barrier, watch


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_killed_workers_cost_no_token(cluster: Any, undisturbed: list[list[int]], role: str) -> None:
    cluster.wait_ready(2, 2, RECOVERY_S)
    if role == "decode":
        barrier, watch = when_all_stream()
        streams = start(cluster, watch)
        barrier.wait()
    else:
        streams = start(cluster, lambda *_: None)
        time.sleep(0.3)  # in the middle of their prompts
    os.kill(busiest(cluster, role), signal.SIGKILL)
    assert [stream.result() for stream in streams] == undisturbed
    if role == "decode":
        assert cluster.status().router.retried >= STREAMS // 2
    cluster.wait_ready(2, 2, RECOVERY_S)
    cluster.wait_idle()


def test_a_stopped_worker_costs_no_token_and_frees_all_when_it_wakes(
    cluster: Any, undisturbed: list[list[int]]
) -> None:
    cluster.wait_ready(2, 2, RECOVERY_S)
    barrier, watch = when_all_stream()
    streams = start(cluster, watch)
    barrier.wait()
    stopped = busiest(cluster, "decode")
    os.kill(stopped, signal.SIGSTOP)
    try:
        assert [stream.result() for stream in streams] == undisturbed
    finally:
        os.kill(stopped, signal.SIGCONT)
    cluster.wait_ready(2, 2, RECOVERY_S)
    cluster.wait_idle()
