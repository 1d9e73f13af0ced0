"""Streams cancelled at random moments, many right after a token, and what is still held 100 ms later.

    python -m bench.cancel

A real local cluster, prefill and decode worker, every prompt handed over. Rounds of streams at once; each is cancelled
by its client at a moment of its own: before anything came, during prefill or the handoff, right after its first or a
later token, or between two. 100 ms after the last cancel of a round the router must run no generator any more; then
everything that workers hold must go to nothing, and stay so.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections import Counter
from typing import Any

import grpc

from baton.config import Config
from baton.wire import inference_pb2 as pb
from bench import report
from bench.load import Target
from deploy import local

AFTER_S = 0.1
IDLE_S = 10.0
QUERY_S = 10.0
HELD = (
    "waiting", "waiting_tokens", "running", "pages_used", "handoffs", "buffer_bytes_used", "buffer_bytes_quarantined",
)  # fmt: skip


async def cancelled(stub: Any, rng: random.Random) -> str:
    """Starts one stream, cancels it, and says at which moment."""
    prompt = [rng.randrange(100, 40_000) for _ in range(rng.choice((8, 32, 100)))]
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt), sampling=pb.Sampling(temperature=0.0, max_tokens=200, ignore_eos=True)
    )
    call = stub.Generate(request, timeout=120)
    moment = rng.choices(("at once", "before a token", "after a token", "between tokens"), (1, 2, 5, 2))[0]
    try:
        if moment == "before a token":
            await asyncio.sleep(rng.uniform(0.0, 0.3))
        elif moment in ("after a token", "between tokens"):
            for _ in range(rng.randint(1, 6)):
                if await call.read() is grpc.aio.EOF:
                    return "ended"
            if moment == "between tokens":
                await asyncio.sleep(rng.uniform(0.001, 0.03))
    finally:
        call.cancel()
    return moment


def held(status: pb.GetStatusResponse) -> dict[str, int]:
    """What workers hold, by their own last word."""
    found = {
        f"{pool.role}.{name}": getattr(worker.load, name)
        for pool in status.pools
        for worker in pool.workers
        for name in HELD
    }
    return {name: amount for name, amount in found.items() if amount}


async def run(address: str, cancels: int, at_once: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    moments: Counter[str] = Counter()
    left: list[int] = []
    freed_s: list[float] = []
    async with Target(address, channels=2) as target:
        await target.connect(QUERY_S)
        stub = target.stub(0)

        async def status() -> pb.GetStatusResponse:
            answer: pb.GetStatusResponse = await stub.GetStatus(pb.GetStatusRequest(), timeout=QUERY_S)
            return answer

        while sum(moments.values()) < cancels:
            moments.update(await asyncio.gather(*(cancelled(target.stub(i), rng) for i in range(at_once))))
            last_s = time.monotonic()
            await asyncio.sleep(AFTER_S)
            left.append((await status()).router.inflight)
            while what := held(await status()):
                if time.monotonic() > last_s + IDLE_S:
                    raise RuntimeError(f"still held after {IDLE_S} s: {what}")
                await asyncio.sleep(0.02)
            freed_s.append(time.monotonic() - last_s)
        await asyncio.sleep(1.0)
        remaining = held(await status())
    return {
        "cancels": sum(moments.values()),
        "at_once": at_once,
        "moments": dict(moments),
        "generators_left_after_100_ms": sum(left),
        "all_freed_p50_ms": 1e3 * statistics.median(freed_s),
        "all_freed_max_ms": 1e3 * max(freed_s),
        "held_at_the_end": remaining,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cancels", type=int, default=500)
    parser.add_argument("--at-once", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    config = Config().with_flags({"name": "cancel", "router.local_prefill": False})
    endpoints = local.up(config, progress=print)
    try:
        result = asyncio.run(run(endpoints.grpc, chosen.cancels, chosen.at_once, chosen.seed))
    finally:
        local.down(config.name, progress=print)
    print(result)
    report.save("cancel", result)


if __name__ == "__main__":
    main()
