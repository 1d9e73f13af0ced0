"""A decode worker that stalls fills its buffers, then the staging, then the line at the router; prefill computes on."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from baton.config import parse
from baton.errors import Overloaded
from baton.wire import inference_pb2 as pb
from engine.build import load_model

if TYPE_CHECKING:
    from tests.unit.workers.conftest import Found, House

POOL = {"kv_tokens": 8192, "threads": 1, "page_tokens": 16, "prefix_cache": False}
BUFFER_BYTES = 24 << 20  # a few prompts' worth: 46 KB a token as float32
CONFIG = parse(
    {
        "model": {"dtype": "float32", "max_context": 1024},
        "prefill": POOL | {"kv_tokens": 1024},
        "decode": POOL,
        "handoff": {
            "transport": "tcp", "codec": "raw", "landing_bytes": BUFFER_BYTES, "staging_bytes": BUFFER_BYTES,
            "stall_s": 60.0, "lease_s": 60.0,
        },
        "router": {"local_prefill": False},
        "admission": {
            "classes": {"plain": {}, "fast": {"ttft_ms": 3000, "priority": 5}}, "default_class": "plain",
            "max_waiting": 16,
        },
    }
)  # fmt: skip
PROMPT_TOKENS = 160
ASKED = 16


def request(number: int, slo_class: str) -> pb.GenerateRequest:
    ids = [(97 * number + 31 * index) % 40_000 + 100 for index in range(PROMPT_TOKENS)]
    sampling = pb.Sampling(temperature=0.0, max_tokens=2, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=sampling, slo_class=slo_class)


async def tokens(house: House, number: int, slo_class: str = "plain") -> int:
    count = 0
    async for response in house.service.stream(request(number, slo_class), arrived_s=time.monotonic()):
        count += len(response.token_ids)
    return count


def held(house: House) -> dict[str, int]:
    load = {name: worker.load() for name, worker in house.workers.items()}
    fields = ("waiting", "running", "pages_used", "handoffs", "buffer_bytes_used")
    amounts = {f"{name}.{key}": getattr(one, key) for name, one in load.items() for key in fields}
    status = house.service.report().router
    amounts |= {"inflight": status.inflight, "waiting": status.waiting}
    return {name: amount for name, amount in amounts.items() if amount}


@pytest.mark.slow  # twenty seconds
async def test_a_stalled_decode_worker_stalls_admission_and_not_the_engine(found: Found, model_folder: Path) -> None:
    async with found(load_model(model_folder, "float32", 1), CONFIG) as house:
        assert [await tokens(house, number) for number in range(2)] == [2, 2]  # both workers have measured something
        prefill, decode = house.workers["p0"], house.workers["d0"]
        going = threading.Event()
        write: Any = decode._engine.cache.scatter

        def stalled(*args: Any) -> None:
            going.wait(120.0)
            write(*args)

        decode._engine.cache.scatter = stalled  # type: ignore[method-assign]
        try:
            asked = [asyncio.create_task(tokens(house, 10 + number)) for number in range(ASKED)]
            refused = None
            async with asyncio.timeout(90.0):
                while (
                    refused is None
                ):  # prompts are computed, their KV fills both buffers, and then it reaches the router
                    await asyncio.sleep(0.5)
                    try:
                        await asyncio.wait_for(tokens(house, 900, "fast"), 0.5)
                    except Overloaded as error:
                        refused = error if error.reason != "shed" else None  # let in, and sent away as the stall grew
                    except TimeoutError:
                        continue
            assert refused.reason in {"ttft", "tpot", "line_full"}
            assert refused.retry_after_ms > 0
            started_s = time.monotonic()
            await asyncio.wrap_future(prefill._loop.call(lambda engine: engine.load()))
            assert time.monotonic() - started_s < 5.0, "the engine's thread waits for somebody"
            for worker in house.workers.values():
                assert worker.load().buffer_bytes_used <= BUFFER_BYTES
            assert not any(task.done() and task.exception() for task in asked)
        finally:
            going.set()
        assert await asyncio.wait_for(asyncio.gather(*asked), 120.0) == [2] * ASKED
        async with asyncio.timeout(10.0):
            while held(house):
                await asyncio.sleep(0.05)
