"""A worker dies by SIGKILL under load: streams end cleanly and soon, the service comes back, survivors hold nothing."""

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
TOKENS = 120
CLEAN_END_S = 2.0
RECOVERY_S = 60.0


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., Any]) -> Iterator[Any]:
    with start_cluster("kill", prefill={"kv_tokens": 4096}, decode={"page_tokens": 32, "kv_tokens": 4096}) as client:
        yield client


def worker_pid(client: Any, role: str) -> int:
    """The process that listens on the token plane's port of the only worker of ``role``."""
    pool = next(pool for pool in client.status().pools if pool.role == role)
    port = int(pool.workers[0].address.rpartition(":")[2])
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return int(connection.pid)
    raise AssertionError(f"nobody listens on {port}")


def wait_until_served(client: Any, deadline_s: float) -> None:
    """Asks until answered; every refusal before that must say UNAVAILABLE."""
    while True:
        code, tokens = client.run(
            lambda *_: None, prompt="Hello", sampling=pb.Sampling(temperature=0.0, max_tokens=4), timeout_s=10
        )
        if code == "OK":
            assert tokens
            return
        assert code == "UNAVAILABLE"
        assert time.monotonic() < deadline_s
        time.sleep(0.25)


def kill_while_streaming(client: Any, role: str) -> list[tuple[float, str, int]]:
    """Kills the worker of ``role`` when every stream has its first token, and waits until new requests are served.

    Returns how each stream ended: seconds after the kill, status, tokens.
    """
    started = threading.Barrier(STREAMS + 1, timeout=60)

    def run(index: int) -> tuple[float, str, int]:
        waited: list[int] = []

        def watch(stream: Any, tokens: int) -> None:
            if not waited:
                waited.append(started.wait())

        code, tokens = client.run(
            watch,
            prompt=f"Story {index}: once upon a time",
            sampling=pb.Sampling(temperature=0.0, max_tokens=TOKENS, ignore_eos=True),
        )
        return time.monotonic(), code, tokens

    with ThreadPoolExecutor(STREAMS) as pool:
        runs = [pool.submit(run, index) for index in range(STREAMS)]
        started.wait()
        os.kill(worker_pid(client, role), signal.SIGKILL)
        killed_s = time.monotonic()
        wait_until_served(client, killed_s + RECOVERY_S)
        print(f"{role} killed: service back after {time.monotonic() - killed_s:.1f} s")
        return [(ended_s - killed_s, code, tokens) for ended_s, code, tokens in (run.result() for run in runs)]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_sigkill_under_load(cluster: Any, role: str) -> None:
    cluster.wait_ready(1, 1, RECOVERY_S)
    ended = kill_while_streaming(cluster, role)
    for after_s, code, tokens in ended:
        if code == "OK":
            assert tokens == TOKENS
        else:
            assert code == "UNAVAILABLE"
            assert after_s < CLEAN_END_S
    if role == "decode":
        assert {code for _, code, _ in ended} == {"UNAVAILABLE"}

    cluster.wait_ready(1, 1, RECOVERY_S)
    cluster.wait_idle()
