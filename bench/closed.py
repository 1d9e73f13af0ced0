"""The closed loop that bench.peers puts on Baton's gRPC endpoint: as many requests at once as asked for, no more."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from baton.wire import inference_pb2 as pb
from bench.load import Target

PROMPT_TOKENS = 512
OUTPUT_TOKENS = 64
VOCABULARY = range(100, 40_000)  # ordinary tokens of SmolLM2
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Row:
    """One concurrency of one pass. Medians over its requests; output tokens of all of them over the wall time."""

    concurrency: int
    done: int
    asked: int
    ttft_ms: float
    tpot_ms: float
    output_tokens_s: float


@dataclass(frozen=True, slots=True)
class _Answer:
    ttft_s: float
    tpot_s: float
    tokens: int


async def load(address: str, concurrency: Sequence[int]) -> list[Row]:
    """A warm-up request, then one row per concurrency."""
    seeds = random.Random()
    async with Target(address, channels=1) as target:
        await target.connect(10.0)
        await _answer(target.stub(0), seeds.getrandbits(32))
        return [await _row(target.stub(0), level, seeds) for level in concurrency]


async def _row(stub: Any, concurrency: int, seeds: random.Random) -> Row:
    """Twice as many requests as run at once (four, one by one): the counts of the peers' load generator."""
    requests = 4 if concurrency == 1 else 2 * concurrency
    gate = asyncio.Semaphore(concurrency)

    async def one(seed: int) -> _Answer:
        async with gate:
            return await _answer(stub, seed)

    start_s = time.perf_counter()
    answers = await asyncio.gather(*(one(seeds.getrandbits(32)) for _ in range(requests)))
    wall_s = time.perf_counter() - start_s
    return Row(
        concurrency,
        sum(answer.tokens == OUTPUT_TOKENS for answer in answers),
        requests,
        1e3 * statistics.median(answer.ttft_s for answer in answers),
        1e3 * statistics.median(answer.tpot_s for answer in answers),
        sum(answer.tokens for answer in answers) / wall_s,
    )


async def _answer(stub: Any, seed: int) -> _Answer:
    ids = random.Random(seed).choices(VOCABULARY, k=PROMPT_TOKENS)
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        sampling=pb.Sampling(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True),
    )
    start_s, times_s = time.perf_counter(), list[float]()
    async for response in stub.Generate(request, timeout=TIMEOUT_S):
        times_s += [time.perf_counter() - start_s] * len(response.token_ids)
    return _Answer(times_s[0], (times_s[-1] - times_s[0]) / max(1, len(times_s) - 1), len(times_s))
