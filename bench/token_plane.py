"""Tokens from decode workers to clients through the real ingress and token plane, with made-up tokens (bench.paced).

    python -m bench.token_plane
    python -m bench.token_plane --streams 256 --rate 7.5 --routers 3 --workers 2

HAProxy, the router replicas under Serve, the workers' connections, admission, detokenizing and ledgers are all real;
only the model's step is replaced by a clock for each stream. Reported over a window in which all streams run:
messages delivered to gRPC clients of the same machine, how long after it was due each token was in the client's hands,
and the CPU time of each kind of server process per message. Twice: with the streams at phases of their own, and with
all tokens of a step at once, as one engine yields them.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from baton.client import Client
from baton.config import Config
from baton.wire import inference_pb2 as pb
from bench import report
from bench.due import late_s
from bench.load import Target
from deploy import local

CONNECT_S = 30.0
SETTLE_S = 4.0  # between the first stream and the window
STREAMS_PER_CHANNEL = 16
KINDS = ("haproxy", "router", "decode", "rest")


@dataclass(frozen=True, slots=True)
class Load:
    streams: int
    rate: float  # tokens/s of one
    seconds: float
    processes: int
    together: bool


@dataclass(frozen=True, slots=True)
class Window:
    """Monotonic seconds, the same for every process of the machine."""

    start_s: float
    end_s: float


def streams(address: str, count: int, load: Load, window: Window) -> tuple[int, list[float]]:
    """One client process: the messages that arrived in ``window``, and how late each of their tokens was."""
    return asyncio.run(_streams(address, count, load, window))


async def _streams(address: str, count: int, load: Load, window: Window) -> tuple[int, list[float]]:
    late: list[float] = []
    messages = 0
    wanted = round((window.end_s - time.monotonic() + 1.0) * load.rate)

    async def one(stub: Any, index: int) -> None:
        nonlocal messages
        await asyncio.sleep(index / count)  # phases spread over a second
        request = pb.GenerateRequest(
            prompt="Once upon a time",
            priority=int(load.together),
            sampling=pb.Sampling(temperature=0.0, max_tokens=wanted, ignore_eos=True, seed=round(1e3 * load.rate)),
        )
        async for response in stub.Generate(request, timeout=120):
            now_s = time.monotonic()
            if window.start_s <= now_s < window.end_s and response.token_ids:
                messages += 1
                late.extend(late_s(token, now_s) for token in response.token_ids)

    async with Target(address, channels=-(-count // STREAMS_PER_CHANNEL)) as target:
        await target.connect(CONNECT_S)
        await asyncio.gather(*(one(target.stub(index), index) for index in range(count)))
    return messages, late


def cpu_s(pid: int) -> dict[str, float]:
    """CPU seconds so far of the cluster under ``pid``, by kind of process."""
    spent = dict.fromkeys(KINDS, 0.0)
    for process in psutil.Process(pid).children(recursive=True):
        try:
            line, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:
            continue
        kind = next((kind for kind in KINDS[:3] if kind == process.name() or f":{kind}" in line), "rest")
        spent[kind] += times.user + times.system
    return spent


def measure(endpoints: local.Endpoints, load: Load, pool: ProcessPoolExecutor) -> dict[str, Any]:
    begin_s = time.monotonic() + SETTLE_S
    window = Window(begin_s, begin_s + load.seconds)
    each = load.streams // load.processes
    runs = [pool.submit(streams, endpoints.grpc, each, load, window) for _ in range(load.processes)]
    time.sleep(max(0.0, window.start_s - time.monotonic()))
    before = cpu_s(endpoints.pid)
    time.sleep(max(0.0, window.end_s - time.monotonic()))
    after = cpu_s(endpoints.pid)
    done = [run.result(timeout=load.seconds * 4 + 60) for run in runs]
    messages, late = sum(count for count, _ in done), [one for _, share in done for one in share]
    return summary(load, messages, late, {kind: after[kind] - before[kind] for kind in KINDS})


def summary(load: Load, messages: int, late: Sequence[float], spent_s: dict[str, float]) -> dict[str, Any]:
    """Rates per second, milliseconds, and CPU milliseconds per message."""
    cuts = statistics.quantiles(late, n=100)
    tokens = len(late)
    return {
        **asdict(load),
        "wanted_per_s": load.streams * load.rate,
        "tokens_per_s": tokens / load.seconds,
        "messages_per_s": messages / load.seconds,
        "added_p50_ms": cuts[49] * 1e3,
        "added_p90_ms": cuts[89] * 1e3,
        "added_p99_ms": cuts[98] * 1e3,
        "cpu_ms_per_token": {kind: 1e3 * spent / tokens for kind, spent in spent_s.items()},
        "cpu_ms_per_token_path": 1e3 * sum(spent_s[kind] for kind in KINDS[:3]) / tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rate", type=float, default=30.0, help="tokens/s of one stream")
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="decode workers")
    parser.add_argument("--processes", type=int, default=1, help="client processes")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each window")
    chosen = parser.parse_args()
    config = Config().with_flags(
        {
            "name": "token-plane",
            "prefill.replicas": 0,
            "decode.replicas": chosen.workers,
            "router.replicas": chosen.routers,
        }
    )
    endpoints = local.up(config, progress=print, supervisor="bench.paced")
    try:
        with Client(endpoints.grpc) as client:
            while not client.health():
                time.sleep(0.1)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(chosen.processes, context) as pool:
            list(pool.map(abs, range(chosen.processes)))  # their imports must not take of a window
            rows = []
            for together in (False, True):
                load = Load(chosen.streams, chosen.rate, chosen.seconds, chosen.processes, together)
                rows.append(measure(endpoints, load, pool))
                print(rows[-1], flush=True)
    finally:
        local.down(config.name, progress=print)
    report.save(f"token-plane-{chosen.streams}", {"routers": chosen.routers, "workers": chosen.workers, "rows": rows})


if __name__ == "__main__":
    main()
