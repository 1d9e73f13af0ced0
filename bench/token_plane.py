"""Tokens from decode workers to clients through the real ingress and token plane, with made-up tokens (bench.paced).

    python -m bench.token_plane
    python -m bench.token_plane --streams 256 --rate 7.5,10,15,20 --routers 3 --workers 2

HAProxy, the router replicas under Serve, the workers' connections, admission, detokenizing and ledgers are all real;
only the model's step is replaced by a clock for each stream. Reported over a window in which all streams run:
messages delivered to gRPC clients of the same machine, how long after it was due each token was in the client's hands,
and the CPU time of each kind of process per message, the clients' too. Twice: with the streams at phases of their own,
and with all tokens of a step at once, as one engine yields them. Beside each row the limits: the same past HAProxy
(``direct``, with one router), and the same messages from gRPC alone (``bench.bare``). Of several rates the next is
tried as long as the one before was delivered; ``cores`` says who uses how many of them.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import psutil

from baton.client import Client
from baton.config import Config
from baton.wire import inference_pb2 as pb
from bench import bare, report
from bench.due import late_s
from bench.load import Target
from deploy import local

CONNECT_S = 30.0
SETTLE_S = 4.0  # between the first stream and the window
STREAMS_PER_CHANNEL = 16
DELIVERED = 1880 / 1920  # share of the tokens wanted that count as all of them: the rest is on its way at the end
KINDS = ("haproxy", "router", "decode", "rest", "client")
PORTS = "RAY_SERVE_DIRECT_INGRESS"  # how the environment variables begin that say where routers may listen


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


@dataclass(frozen=True, slots=True)
class Got:
    """What one client process saw in the window."""

    messages: int
    late_s: list[float]  # of each token
    cpu_s: float


def streams(address: str, count: int, load: Load, window: Window) -> Got:
    """One client process."""
    return asyncio.run(_streams(address, count, load, window))


async def _streams(address: str, count: int, load: Load, window: Window) -> Got:
    late: list[float] = []
    messages = 0
    cpu_s: list[float] = []
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

    async def watch() -> None:
        for at_s in (window.start_s, window.end_s):
            await asyncio.sleep(at_s - time.monotonic())
            cpu_s.append(time.process_time())

    async with Target(address, channels=-(-count // STREAMS_PER_CHANNEL)) as target:
        await target.connect(CONNECT_S)
        await asyncio.gather(watch(), *(one(target.stub(index), index) for index in range(count)))
    return Got(messages, late, cpu_s[1] - cpu_s[0])


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


def bare_cpu_s(pid: int) -> dict[str, float]:
    """CPU seconds so far of a bare server, which is its own router."""
    times = psutil.Process(pid).cpu_times()
    return dict.fromkeys(KINDS, 0.0) | {"router": times.user + times.system}


def router_addresses(pid: int) -> list[str]:
    """Where the routers of the cluster under ``pid`` are reached past HAProxy."""
    addresses = []
    for process in psutil.Process(pid).children(recursive=True):
        if ":router" in " ".join(process.cmdline()):
            lowest, highest = (int(process.environ()[f"{PORTS}_{end}_GRPC_PORT"]) for end in ("MIN", "MAX"))
            listening = [one for one in process.net_connections() if one.status == psutil.CONN_LISTEN]
            ports = {one.laddr.port for one in listening if one.laddr}
            addresses += [f"127.0.0.1:{port}" for port in sorted(ports) if lowest <= port <= highest]
    return addresses


def measure(
    address: str, spent: Callable[[], dict[str, float]], load: Load, pool: ProcessPoolExecutor
) -> dict[str, Any]:
    """Runs ``load`` against ``address``; spent: CPU seconds so far of the servers, by kind."""
    begin_s = time.monotonic() + SETTLE_S
    window = Window(begin_s, begin_s + load.seconds)
    each = load.streams // load.processes
    runs = [pool.submit(streams, address, each, load, window) for _ in range(load.processes)]
    time.sleep(max(0.0, window.start_s - time.monotonic()))
    before = spent()
    time.sleep(max(0.0, window.end_s - time.monotonic()))
    after = spent()
    done = [run.result(timeout=load.seconds * 4 + 60) for run in runs]
    messages, late = sum(got.messages for got in done), [one for got in done for one in got.late_s]
    by_kind = {kind: after[kind] - before[kind] for kind in KINDS} | {"client": sum(got.cpu_s for got in done)}
    return summary(load, messages, late, by_kind)


def rising(
    address: str, spent: Callable[[], dict[str, float]], loads: Sequence[Load], pool: ProcessPoolExecutor
) -> list[dict[str, Any]]:
    """``loads`` one after the other, up to the first that is not delivered."""
    rows: list[dict[str, Any]] = []
    for load in loads:
        rows.append(_told("all", measure(address, spent, load, pool)))
        if rows[-1]["tokens_per_s"] < DELIVERED * rows[-1]["wanted_per_s"]:
            break
    return rows


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
        "cores": {kind: spent / load.seconds for kind, spent in spent_s.items()},
    }


def _rates(text: str) -> list[float]:
    return [float(rate) for rate in text.split(",")]


def _told(name: str, row: dict[str, Any]) -> dict[str, Any]:
    by_kind = ", ".join(f"{kind} {ms:.3f}" for kind, ms in row["cpu_ms_per_token"].items() if ms)
    cores = ", ".join(f"{kind} {share:.2f}" for kind, share in row["cores"].items() if share)
    print(
        f"{name}, {'together' if row['together'] else 'own phases'}: {row['messages_per_s']:.0f} messages/s, "
        f"{row['tokens_per_s']:.0f} of {row['wanted_per_s']:.0f} tokens/s, added p50 {row['added_p50_ms']:.1f} "
        f"p90 {row['added_p90_ms']:.1f} p99 {row['added_p99_ms']:.1f} ms; CPU ms/token {by_kind}; cores {cores}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rate", type=_rates, default=[30.0], help="tokens/s of one stream; with commas, rising")
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
            kinds = [
                [Load(chosen.streams, rate, chosen.seconds, chosen.processes, together) for rate in chosen.rate]
                for together in (False, True)
            ]
            spent = partial(cpu_s, endpoints.pid)
            rows = [rising(endpoints.grpc, spent, loads, pool) for loads in kinds]
            if len(routers := router_addresses(endpoints.pid)) == 1:
                for (row, *_), (load, *_) in zip(rows, kinds, strict=True):
                    row["direct"] = _told("past HAProxy", measure(routers[0], spent, load, pool))
            local.down(config.name, progress=print)
            with bare.server() as (address, pid):
                for (row, *_), (load, *_) in zip(rows, kinds, strict=True):
                    row["bare"] = _told("gRPC alone", measure(address, partial(bare_cpu_s, pid), load, pool))
    finally:
        local.down(config.name, progress=print)
    result = {"routers": chosen.routers, "workers": chosen.workers, "rows": [row for group in rows for row in group]}
    report.save(f"token-plane-{chosen.streams}", result)


if __name__ == "__main__":
    main()
