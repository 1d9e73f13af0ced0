"""A worker dies by SIGKILL under load: streams end cleanly and soon, the service comes back, survivors hold nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import psutil
import pytest

from baton.wire import inference_pb2 as pb

pytestmark = pytest.mark.ray

STREAMS = 8
CLEAN_END_S = 2.0
RECOVERY_S = 60.0


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., Any]) -> Iterator[Any]:
    with start_cluster("kill", decode={"page_tokens": 32}) as client:
        yield client


def worker_pid(client: Any, role: str) -> int:
    """The process that listens on the token plane's port of the only worker of ``role``."""
    pool = next(pool for pool in client.status().pools if pool.role == role)
    port = int(pool.workers[0].address.rpartition(":")[2])
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return int(connection.pid)
    raise AssertionError(f"nobody listens on {port}")


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_sigkill_under_load(cluster: Any, role: str) -> None:
    cluster.wait_ready(1, 1, RECOVERY_S)
    started = threading.Barrier(STREAMS + 1, timeout=60)
    ended: list[tuple[float, str, int]] = []

    def run(index: int) -> None:
        tokens = 0
        try:
            stream = cluster.stream(
                prompt=f"Story {index}: once upon a time",
                sampling=pb.Sampling(temperature=0.0, max_tokens=200, ignore_eos=True),
            )
            for chunk in stream:
                if not tokens:
                    started.wait()
                tokens += len(chunk.token_ids)
            code = "OK"
        except grpc.RpcError as error:
            code = error.code().name
        ended.append((time.monotonic(), code, tokens))

    with ThreadPoolExecutor(STREAMS) as pool:
        for index in range(STREAMS):
            pool.submit(run, index)
        started.wait()
        os.kill(worker_pid(cluster, role), signal.SIGKILL)
        killed_s = time.monotonic()

    for ended_s, code, tokens in ended:
        if code == "OK":
            assert tokens == 200
        else:
            assert code == "UNAVAILABLE"
            assert ended_s - killed_s < CLEAN_END_S
    if role == "decode":
        assert {code for _, code, _ in ended} == {"UNAVAILABLE"}

    while True:
        try:
            answer = cluster.generate(prompt="Hello", sampling=pb.Sampling(temperature=0.0, max_tokens=4), timeout_s=5)
            break
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            assert time.monotonic() - killed_s < RECOVERY_S
            time.sleep(0.25)
    assert answer.tokens
    print(f"{role} killed: service back after {time.monotonic() - killed_s:.1f} s")
    cluster.wait_ready(1, 1, RECOVERY_S)
    cluster.wait_idle()
