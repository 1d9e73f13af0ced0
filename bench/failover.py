"""The pause of streams whose decode worker is killed or stopped, taken apart.

    python -m bench.failover --rounds 6 --streams 4

Two prefill and two decode workers, real processes. In every round the streams are in the middle of their answers when
the decode worker of at least one is killed (SIGKILL) or stopped (SIGSTOP); the next round waits until all workers are
back. Beside the pause, from the fault to the next token: when the kernel had closed the worker's connections, when
the router noticed, and what each stage of serving again took, as the difference between the stream's ledger and that of
its undisturbed run.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import select
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton import ledger
from baton.client import AsyncClient, Retry
from baton.config import Config, parse
from bench import report
from bench.chaos import Stream, ask, replicas, requests, settled
from deploy import local

BUDGET_S = 60.0
SEEN_TOKENS = 6  # of every stream, before the fault
BACK_S = 60.0
LOOK_S = 0.005
AGAIN = tuple(stage for stage in ledger.STAGES if stage not in ("recover", "decode"))


@dataclass(frozen=True, slots=True)
class Fault:
    """Monotonic seconds of this process."""

    at_s: float
    closed_s: float  # when the kernel was through with a killed process


async def calm(client: AsyncClient, asked: Sequence[tuple[str, int]]) -> list[Stream]:
    """One after the other: nobody waits for anybody."""
    return [await ask(client, Stream(prompt, tokens), BUDGET_S) for prompt, tokens in asked]


async def hit(
    client: AsyncClient, asked: Sequence[tuple[str, int]], supervisor: int, kind: str, draw: random.Random
) -> tuple[Fault, list[Stream]]:
    """The streams again, each begun when the one before has its first tokens; one decode worker is lost in between."""
    streams = [Stream(prompt, tokens) for prompt, tokens in asked]
    running = []
    for stream in streams:
        running.append(asyncio.create_task(ask(client, stream, BUDGET_S)))
        for _ in range(int(BUDGET_S / LOOK_S)):
            if len(stream.tokens) >= SEEN_TOKENS or running[-1].done():
                break
            await asyncio.sleep(LOOK_S)
    victim = draw.choice(await asyncio.to_thread(replicas, supervisor, "decode"))
    watched = os.pidfd_open(victim.pid)
    os.kill(victim.pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    at_s = closed_s = time.monotonic()
    if kind == "kill":  # the kernel frees its memory first, closes its connections then
        await asyncio.to_thread(select.select, [watched], [], [], BACK_S)
        closed_s = time.monotonic()
    os.close(watched)
    await asyncio.gather(*running)
    if kind == "stop":
        victim.resume()
    return Fault(at_s, closed_s), streams


def pauses(fault: Fault, before: Sequence[Stream], after: Sequence[Stream]) -> list[dict[str, float]]:
    """Of every stream that lost its worker, in seconds."""
    found = []
    for undisturbed, stream in zip(before, after, strict=True):
        assert stream.status == "OK", stream.message
        assert stream.tokens == undisturbed.tokens, stream.prompt[:12]
        if not stream.stages.get("recover"):
            continue
        gaps = [(end - begin, begin, end) for begin, end in itertools.pairwise(stream.times_s) if end > fault.at_s]
        _, last_s, next_s = max(gaps)  # tokens that were under way still arrive after a kill
        pause_s = next_s - max(last_s, fault.at_s)
        again = {name: stream.stages[name] - undisturbed.stages[name] for name in AGAIN}
        lost_s = last_s + stream.stages["recover"]
        found.append(
            {
                "pause": pause_s,
                "pause less prefill": pause_s - max(0.0, again["prefill"]),
                "connection closed": fault.closed_s - fault.at_s,
                "noticed, after that": lost_s - fault.closed_s,
                **again,
            }
        )
    return found


async def measure(options: argparse.Namespace, supervisor: int, client: AsyncClient, config: Config) -> dict[str, Any]:
    draw = random.Random(options.seed)
    told: dict[str, Any] = {"streams": options.streams, "rounds": options.rounds}
    for kind in ("kill", "stop"):
        found: list[dict[str, float]] = []
        for number in range(options.rounds):
            asked = [(prompt, options.tokens) for prompt, _ in requests(options.streams, options.seed + number)]
            before = await calm(client, asked)
            fault, after = await hit(client, asked, supervisor, kind, draw)
            found += pauses(fault, before, after)
            print(
                f"{kind} {number + 1}: {[round(one['pause'], 2) for one in pauses(fault, before, after)]}", flush=True
            )
            limit_s = time.monotonic() + BACK_S
            while held := await settled(client, config):
                assert time.monotonic() < limit_s, held
        told[kind] = {"streams": len(found), "seconds": {n: middle([one[n] for one in found]) for n in found[0]}}
    return told


def middle(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"p50": round(statistics.median(ordered), 3), "p90": round(ordered[int(0.9 * (len(ordered) - 1))], 3)}


async def run(options: argparse.Namespace, endpoints: local.Endpoints, config: Config) -> dict[str, Any]:
    async with AsyncClient(endpoints.grpc, retry=Retry(attempts=1)) as client:
        return await measure(options, endpoints.pid, client, config)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="of kills, and as many of stops")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    pool = {"replicas": 2, "kv_tokens": 8192}
    config = parse(
        {
            "name": "failover",
            "model": {"dtype": "float32", "cache_dir": str(Path("~/.cache/baton").expanduser())},
            "prefill": pool,
            "decode": pool,
            "router": {"local_prefill": False},  # else a killed worker's part of the first ledger is missing
            "handoff": {"codec": "lossless"},
            "ingress": {"grpc_port": 19620, "http_port": 19621},
        }
    )
    with tempfile.TemporaryDirectory(prefix="baton-failover-") as home:
        os.environ |= {"HOME": home, "BATON_HOME": f"{home}/.baton"}
        endpoints = local.up(config, progress=lambda line: print(line, flush=True))
        try:
            result = asyncio.run(run(options, endpoints, config))
        finally:
            local.down(config.name, progress=lambda line: print(line, flush=True))
    for kind in ("kill", "stop"):
        print(f"\n{kind}: {result[kind]['streams']} streams")
        for name, seconds in result[kind]["seconds"].items():
            print(f"  {name:20} p50 {1e3 * seconds['p50']:7.0f} ms   p90 {1e3 * seconds['p90']:7.0f} ms")
    report.save("failover", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
