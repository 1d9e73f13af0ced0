"""What a request costs beside its steps: CPU of the router, the ingress, Ray, this client, encoding and landing.

On a machine of many cores nobody notices; on a small one the engines get what this leaves. It is measured before any
load, by requests that come two at a time, so that a prediction may use it. So is, by single ones, how much later than
its prefill ends a first token is here.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from baton.wire import inference_pb2 as pb
from bench import load, machine, workload
from bench.stats import OK, Record

PROMPT_TOKENS = 128
OUTPUTS = (2, 34)  # tokens: what the longer ones cost more is their tokens'
TOGETHER = 2  # a core that has something to do anyway serves a wake-up for less
ROUNDS = 6
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Errands:
    """CPU seconds beside the engines' own: of a request, and of each of its output tokens. ``first_s``: see above."""

    request_s: float
    token_s: float
    first_s: float


async def measure(target: load.Target, model: pb.Model, ours: Sequence[psutil.Process], rest: machine.Cores) -> Errands:
    """``ours``: the service's processes; ``rest``: what is in use without requests. Raises RuntimeError when a request
    fails."""
    ends = set(model.eos_token_ids)
    allowed = [token for token in range(model.vocab_size) if token not in ends]
    _, single = await _some(target, allowed, OUTPUTS[0], ours, rest, together=1)
    first_s = statistics.median(one.ttft_s - one.stages["queue"] - one.stages["prefill"] for one in single)
    short_s, long_s = [(await _some(target, allowed, output, ours, rest, together=TOGETHER))[0] for output in OUTPUTS]
    token_s = max(0.0, (long_s - short_s) / (OUTPUTS[1] - OUTPUTS[0]))
    return Errands(max(0.0, short_s - OUTPUTS[0] * token_s), token_s, first_s)


async def _some(
    target: load.Target, allowed: Sequence[int], output: int, ours: Sequence[psutil.Process], rest: machine.Cores, *,
    together: int,
) -> tuple[float, list[Record]]:  # fmt: skip
    """CPU seconds a request beside the engines and what is in use anyway; and the requests."""
    loop, rng, records = asyncio.get_running_loop(), random.Random(), list[Record]()
    started_s, meter = loop.time(), machine.Meter(ours)
    planned = workload.Planned(0.0, PROMPT_TOKENS, output)
    sampling = pb.Sampling(temperature=0.0, max_tokens=output, ignore_eos=True)
    for _ in range(ROUNDS):
        prompts = [workload.prompt_ids(index, PROMPT_TOKENS, allowed, rng) for index in range(together)]
        asks = [
            load.Ask(planned, pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=sampling)) for ids in prompts
        ]
        stop = asyncio.Event()
        records += await load.run(target, asks, timeout_s=TIMEOUT_S, stop=stop, progress=lambda *_: None)
    for record in records:
        if record.status != OK:
            raise RuntimeError(f"a request before the load failed: {record.status} {record.message}")
    cores, passed_s = meter.read(), loop.time() - started_s
    return (cores.beside - rest.beside) * passed_s / len(records), records
