"""Streams while workers and routers are killed and stopped at random, beside the same streams undisturbed.

    python -m bench.chaos --requests 300 --faults 30 --seed 1            UCX's own choice (shared memory, CMA)
    python -m bench.chaos --requests 300 --faults 30 --seed 1 --ucx tcp

Two prefill workers, two decode workers, two routers on this machine, real processes all. First every request runs
undisturbed at full load, which gives its tokens and the capacity; then all again, arriving by Poisson at a share of
that, under faults. What must hold: every stream equals its undisturbed run, token for token; only a killed router's own
streams may end, with UNAVAILABLE; nothing outlives its deadline; afterwards nothing is held anywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from baton.client import AsyncClient, Retry
from baton.config import Config, parse
from baton.errors import BatonError
from baton.wire import inference_pb2 as pb
from bench import report
from deploy import local

STOP_S = (0.3, 4.0)  # how long a stopped process stays so
SLACK_S = 2.0  # after its deadline a stream must have ended
IDLE_S = 30.0
WORDS = ("the", "ship", "came", "into", "harbour", "with", "a", "great", "deal", "of", "tea", "and", "nobody", "knew")


@dataclass(slots=True)
class Stream:
    """One request as its client saw it; seconds are of this process's monotonic clock."""

    prompt: str
    max_tokens: int
    sent_s: float = 0.0
    ended_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    status: str = "OK"
    message: str = ""
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fault:
    at_s: float
    role: str
    kind: str
    seconds: float  # until a stopped process goes on


def requests(count: int, seed: int) -> list[tuple[str, int]]:
    """Prompts and output lengths; no two prompts begin alike."""
    draw = random.Random(seed)
    return [
        (f"Story {index}. " + " ".join(draw.choices(WORDS, k=draw.randint(20, 220))), draw.randint(16, 48))
        for index in range(count)
    ]


async def ask(client: AsyncClient, stream: Stream, budget_s: float) -> Stream:
    stream.sent_s = time.monotonic()
    try:
        parts = client.stream(
            stream.prompt, max_tokens=stream.max_tokens, temperature=0.0, ignore_eos=True, timeout_s=budget_s
        )
        async with aclosing(parts):
            async for part in parts:
                stream.times_s += [time.monotonic()] * len(part.token_ids)
                stream.tokens += part.token_ids
                if part.ledger is not None:
                    stream.stages = dict(part.ledger.stages)
    except BatonError as error:
        stream.status, stream.message = error.code, str(error)
    stream.ended_s = time.monotonic()
    return stream


async def undisturbed(client: AsyncClient, asked: Sequence[tuple[str, int]], concurrency: int) -> list[Stream]:
    """All of them, as many at once as the service serves well."""
    gate = asyncio.Semaphore(concurrency)

    async def one(prompt: str, tokens: int) -> Stream:
        async with gate:
            return await ask(client, Stream(prompt, tokens), 300.0)

    return list(await asyncio.gather(*(one(prompt, tokens) for prompt, tokens in asked)))


async def disturbed(
    client: AsyncClient, asked: Sequence[tuple[str, int]], rate: float, budget_s: float, seed: int
) -> list[Stream]:
    draw, tasks = random.Random(seed), []
    for prompt, tokens in asked:
        tasks.append(asyncio.create_task(ask(client, Stream(prompt, tokens), budget_s)))
        await asyncio.sleep(draw.expovariate(rate))
    return list(await asyncio.gather(*tasks))


def schedule(count: int, span_s: float, seed: int) -> list[Fault]:
    """Faults spread over the span: about half kills, half stops; workers mostly, a router now and then."""
    draw = random.Random(seed + 1)
    return [
        Fault(
            (index + draw.random()) * span_s / count,
            draw.choices(("decode", "prefill", "router"), weights=(9, 9, 2))[0],
            draw.choice(("kill", "stop")),
            draw.uniform(*STOP_S),
        )
        for index in range(count)
    ]


def replicas(supervisor: int, role: str) -> list[psutil.Process]:
    """The running replicas of ``role``: Serve names its processes after them."""
    found = []
    for process in psutil.Process(supervisor).children(recursive=True):
        try:
            if f":{role}" in process.name() + " ".join(process.cmdline()[:1]) and process.status() != "zombie":
                found.append(process)
        except psutil.Error:
            continue
    return found


async def torment(supervisor: int, faults: Sequence[Fault], seed: int) -> list[dict[str, Any]]:
    """Carries the faults out; what was done when."""
    draw, begun_s, done = random.Random(seed + 2), time.monotonic(), []
    waking: list[asyncio.Task[None]] = []

    async def wake(process: psutil.Process, seconds: float) -> None:
        await asyncio.sleep(seconds)
        process.resume()

    for fault in faults:
        await asyncio.sleep(max(0.0, begun_s + fault.at_s - time.monotonic()))
        victims = await asyncio.to_thread(replicas, supervisor, fault.role)
        if not victims:
            continue
        victim = draw.choice(victims)
        os.kill(victim.pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
        done.append({"at_s": time.monotonic(), "role": fault.role, "kind": fault.kind, "seconds": fault.seconds})
        if fault.kind == "stop":
            waking.append(asyncio.create_task(wake(victim, fault.seconds)))
        print(f"{time.monotonic() - begun_s:6.1f} s  {fault.kind} {fault.role} {victim.pid}", flush=True)
    await asyncio.gather(*waking)
    return done


async def settled(client: AsyncClient, config: Config) -> dict[str, int]:
    """What is still held when all workers are back and some time has passed; empty when nothing is."""
    deadline_s, held = time.monotonic() + IDLE_S, {"unreachable": 1}
    while time.monotonic() < deadline_s:
        await asyncio.sleep(0.5)
        try:
            status = await client.status()
        except BatonError:
            continue
        workers = [worker for pool in status.pools for worker in pool.workers]
        ready = sum(worker.state == pb.WORKER_STATE_READY for worker in workers)
        held = {"missing workers": max(0, config.prefill.replicas + config.decode.replicas - ready)}
        for name in ("waiting", "running", "pages_used", "handoffs", "buffer_bytes_used", "buffer_bytes_quarantined"):
            held[name] = sum(getattr(worker.load, name) for worker in workers)
        held["inflight"] = status.router.inflight
        held = {name: count for name, count in held.items() if count}
        if not held:
            break
    return held


def verdict(calm: Sequence[Stream], stormy: Sequence[Stream], faults: Sequence[dict[str, Any]], budget_s: float) -> Any:
    """The figures of one run."""
    pairs = list(zip(calm, stormy, strict=True))
    routers = [fault["at_s"] for fault in faults if fault["role"] == "router" and fault["kind"] == "kill"]
    broken = [s for s in stormy if s.status != "OK"]
    excused = [s for s in broken if s.status == "UNAVAILABLE" and any(0 <= s.ended_s - at < SLACK_S for at in routers)]
    affected = [(before, after) for before, after in pairs if after.stages.get("recover", 0.0) > 0]
    extra = sorted((after.ended_s - after.sent_s) - (before.ended_s - before.sent_s) for before, after in affected)
    gaps = [gap for fault in faults if (fault["role"], fault["kind"]) == ("decode", "kill")
            for gap in failover(fault["at_s"], affected)]  # fmt: skip
    wrong = [after.prompt[:12] for before, after in pairs if after.tokens != before.tokens[: len(after.tokens)]]
    return {
        "requests": len(stormy),
        "equal": sum(before.tokens == after.tokens for before, after in pairs),
        "wrong": wrong,
        "short": sum(s.status == "OK" and len(s.tokens) != s.max_tokens for s in stormy),
        "errors": Counter(f"{s.status}: {s.message}" for s in broken),
        "errors of killed routers' clients": len(excused),
        "late": sum(s.ended_s - s.sent_s > budget_s + SLACK_S for s in stormy),
        "faults": Counter(f"{fault['kind']} {fault['role']}" for fault in faults),
        "recovered": len(affected),
        "recover_s": _percentiles([after.stages["recover"] for _, after in affected]),
        "extra_latency_s": _percentiles(extra),
        "failover_less_prefill_s": _percentiles(gaps),
    }


def failover(killed_s: float, affected: Sequence[tuple[Stream, Stream]]) -> list[float]:
    """Pauses of the streams that were hit, less what computing prompt and tokens again took."""
    gaps = []
    for before, after in affected:
        pauses = [(late - early, early) for early, late in zip(after.times_s, after.times_s[1:], strict=False)]
        if not pauses:
            continue
        longest, began_s = max(pauses)
        if began_s - 0.1 <= killed_s <= began_s + longest:
            again_s = after.stages.get("prefill", 0.0) - before.stages.get("prefill", 0.0)
            gaps.append(longest - max(0.0, again_s))
    return gaps


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "p50": round(statistics.median(ordered), 3),
        "p90": round(ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))], 3),
        "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 3),
        "max": round(ordered[-1], 3),
    }


async def measure(options: argparse.Namespace, endpoints: local.Endpoints, config: Config) -> dict[str, Any]:
    asked = requests(options.requests, options.seed)
    async with AsyncClient(endpoints.grpc, retry=Retry(attempts=1)) as client:
        begun_s = time.monotonic()
        calm = await undisturbed(client, asked, options.concurrency)
        capacity = len(asked) / (time.monotonic() - begun_s)
        assert all(stream.status == "OK" for stream in calm), Counter(stream.message for stream in calm)
        rate = options.load * capacity
        span_s = len(asked) / rate
        print(f"capacity {capacity:.2f} requests/s; {options.faults} faults in {span_s:.0f} s", flush=True)
        stormy, faults = await asyncio.gather(
            disturbed(client, asked, rate, options.budget_s, options.seed),
            torment(endpoints.pid, schedule(options.faults, span_s, options.seed), options.seed),
        )
        left = await settled(client, config)
    told = verdict(calm, stormy, faults, options.budget_s)
    return {"ucx": options.ucx or "UCX's choice", "capacity_per_s": round(capacity, 2), "rate_per_s": round(rate, 2),
            **told, "held_afterwards": left}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--load", type=float, default=0.6, help="share of the capacity")
    parser.add_argument("--concurrency", type=int, default=8, help="of the undisturbed run")
    parser.add_argument("--budget-s", type=float, default=120.0)
    parser.add_argument("--ucx", default="", help="UCX_TLS of the workers, for instance tcp")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    pool = {"replicas": 2, "kv_tokens": 8192}
    config = parse(
        {
            "name": "chaos",
            "model": {"dtype": "float32", "cache_dir": str(Path("~/.cache/baton").expanduser())},
            "prefill": pool,
            "decode": pool,
            "handoff": {"codec": "lossless", "ucx_tls": options.ucx},
            "router": {"replicas": 2},
            "ingress": {"grpc_port": 19610, "http_port": 19611},
        }
    )
    with tempfile.TemporaryDirectory(prefix="baton-chaos-") as home:
        os.environ |= {"HOME": home, "BATON_HOME": f"{home}/.baton"}
        endpoints = local.up(config, progress=lambda line: print(line, flush=True))
        try:
            result = asyncio.run(measure(options, endpoints, config))
        finally:
            local.down(config.name, progress=lambda line: print(line, flush=True))
    for name, value in result.items():
        print(f"{name:36} {value}")
    report.save(f"chaos{'-' + options.ucx if options.ucx else ''}", result)
    faultless = not (result["wrong"] or result["short"] or result["late"] or result["held_afterwards"])
    return 0 if faultless and sum(result["errors"].values()) == result["errors of killed routers' clients"] else 1


if __name__ == "__main__":
    sys.exit(main())
