"""Measures what a worker adds to its engine's steps: encoding and sending behind them, frames, its event loop.

A prefill and a decode worker, each in a process of its own, serve this process, which is their router. Every request
comes alone, between two runs of the same steps by an engine here, so that drift of the machine's speed falls on both
alike and no worker waits for another. What a step takes longer there is what serving adds to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from baton.config import Config
from baton.errors import BatonError, ConfigError
from baton.secure import write_key
from baton.wire import inference_pb2 as pb
from decode_worker.worker import DecodeWorker
from engine.build import build_engine, load_model
from engine.model import Model
from placement.cost import StepShape
from placement.measure import DECODE_STEPS, Scenario, Watch, pool_for, run_scenario
from placement.profile import Serving
from prefill_worker.worker import PrefillWorker
from router.peers import Role, WorkerAddress
from router.service import InferenceService

HOST = "127.0.0.1"
PROMPTS = (32, 64)  # tokens, one chunk each: it adds as much to longer ones, beside which it is lost in their noise
TURNS = 10
WARM_TURNS = 1
OUTPUT_TOKENS = 14
READY_S = 120.0  # to load the model twice more
REQUEST_S = 60.0
ROLES: tuple[Role, ...] = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Served:
    """Seconds that one request took longer, beyond the steps themselves."""

    prefill_s: float
    step_s: float  # each token after the second, for which the client waits until the KV has landed


def measure_served(model: Model, folder: Path, settings: Config) -> Serving:
    """Raises :class:`ConfigError` where a worker does not start or a request fails."""
    prompts = [min(tokens, settings.model.max_context // 2) for tokens in PROMPTS]
    with ExitStack() as held:
        key = Path(held.enter_context(tempfile.TemporaryDirectory())) / "key"
        write_key(key)
        settings = _alone(settings, key)
        pipes = {role: held.enter_context(_worker(role, folder, settings, model.threads)) for role in ROLES}
        addresses = {role: _address(role, pipe) for role, pipe in pipes.items()}
        here = _Here(model, settings, prompts)
        served = asyncio.run(_in_turns(here, InferenceService(settings, folder, router_id="profile"), addresses))
    return serving(served)


def serving(served: Sequence[Served]) -> Serving:
    """From what requests took longer; a negative share is noise."""
    return Serving(
        chunk_s=max(0.0, statistics.median(one.prefill_s for one in served)),
        step_s=max(0.0, statistics.median(one.step_s for one in served)),
    )


def _alone(settings: Config, key: Path) -> Config:
    """``settings`` with one worker of each kind that computes every token, for whoever has this key."""
    pool = {"replicas": 1, "prefix_cache": False}
    return settings.model_copy(
        update={
            "prefill": settings.prefill.model_copy(update=pool),
            "decode": settings.decode.model_copy(update=pool),
            "router": settings.router.model_copy(update={"local_prefill": False}),
            "security": settings.security.model_copy(update={"cluster_key_file": str(key)}),
        }
    )


class _Here:
    """The engine of this process."""

    def __init__(self, model: Model, settings: Config, prompts: Sequence[int]) -> None:
        self.prompts = tuple(prompts)
        max_context = min(settings.model.max_context, model.spec.max_context)
        grid = [Scenario(settings.prefill.step_tokens, (tokens,), ()) for tokens in prompts]
        grid += [Scenario(settings.prefill.step_tokens, (), (tokens + DECODE_STEPS,)) for tokens in prompts]
        self._pool = pool_for(settings.prefill, settings.prefill.step_tokens, grid, max_context)
        self._engine = build_engine(model, self._pool, max_context)

    def prefill_s(self, tokens: int) -> float:
        return self._seconds(Scenario(self._pool.step_tokens, (tokens,), ()))

    def step_s(self, context: int) -> float:
        return self._seconds(Scenario(self._pool.step_tokens, (), (context,)))

    def _seconds(self, scenario: Scenario) -> float:
        seen: dict[StepShape, list[float]] = {}
        run_scenario(self._engine, self._pool, scenario, seen, Watch("wall"))
        return sum(map(sum, seen.values()))


@contextlib.contextmanager
def _worker(role: Role, folder: Path, settings: Config, threads: int) -> Iterator[Connection]:
    """A worker in a process of its own; it ends when this does."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, role, folder, settings, threads), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()
        process.join(READY_S)
        if process.is_alive():
            process.kill()
            process.join()


def _work(parent: Connection, role: Role, folder: Path, settings: Config, threads: int) -> None:
    """Serves until the parent closes its end."""
    model = load_model(folder, settings.model.dtype, threads)
    make = PrefillWorker if role == "prefill" else DecodeWorker
    worker: PrefillWorker | DecodeWorker = make(model, settings, worker_id=role, host=HOST)

    async def serve() -> None:
        await worker.start()
        try:
            parent.send((worker.port, worker.generation))
            with contextlib.suppress(EOFError):
                await asyncio.to_thread(parent.recv_bytes)
        finally:
            await worker.close()

    asyncio.run(serve())


def _address(role: Role, pipe: Connection) -> WorkerAddress:
    if not pipe.poll(READY_S):
        raise ConfigError(f"the {role} worker is not ready after {READY_S:.0f} s", field="profile.serving")
    try:
        port, generation = pipe.recv()
    except EOFError:
        raise ConfigError(f"the {role} worker failed to start", field="profile.serving") from None
    return WorkerAddress(role, role, HOST, port, generation)


async def _in_turns(here: _Here, service: InferenceService, addresses: Mapping[Role, WorkerAddress]) -> list[Served]:
    """What serving adds, request by request."""
    served, rng = list[Served](), random.Random(0)
    try:
        for role, address in addresses.items():
            service.pools.update(role, [address])
        async with asyncio.timeout(READY_S):
            while not service.ready:  # noqa: ASYNC110 - pools tell nobody
                await asyncio.sleep(0.02)
        for turn in range(WARM_TURNS + TURNS):
            for tokens in here.prompts:
                one = await _one(here, service, tokens, rng)
                if turn >= WARM_TURNS:
                    served.append(one)
    except BatonError as error:
        raise ConfigError(f"a request was not served: {error}", field="profile.serving") from None
    finally:
        await service.close()
    return served


async def _one(here: _Here, service: InferenceService, tokens: int, rng: random.Random) -> Served:
    """The engine here idles while the workers compute, and they do while it does."""
    before_s, step_before_s = here.prefill_s(tokens), here.step_s(tokens)
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[rng.randrange(100, 1000) for _ in range(tokens)]),
        sampling=pb.Sampling(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True),
    )
    times_s, ledger = list[float](), pb.StageLedger()
    async with asyncio.timeout(REQUEST_S), aclosing(service.stream(request, arrived_s=time.monotonic())) as responses:
        async for response in responses:
            times_s += [time.perf_counter()] * len(response.token_ids)
            if response.finish_reason:
                ledger = response.ledger
    prefill_s = sum(stage.seconds for stage in ledger.stages if stage.name == "prefill")
    alone_s = (before_s + here.prefill_s(tokens)) / 2
    step_alone_s = (step_before_s + here.step_s(tokens)) / 2
    return Served(prefill_s - alone_s, (times_s[-1] - times_s[1]) / (len(times_s) - 2) - step_alone_s)
