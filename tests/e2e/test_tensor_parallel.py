"""Workers of several ranks: the same tokens as one rank's, handed over in both directions; a dead rank ends its worker.

SmolLM2 has 9 attention and 3 key/value heads, which two ranks cannot share, so most tests here run a small random Llama
with SmolLM2's tokenizer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from baton.config import Config, PoolConfig, parse
from baton.errors import Unavailable
from baton.request import Sampling, Work
from baton.wire import inference_pb2 as pb
from decode_worker.worker import DecodeWorker
from engine.build import build_engine, load_model, start_ranks
from engine.comm import RankLost
from engine.engine import Engine
from engine.model import Model
from engine.ranks import Ranks
from prefill_worker.worker import PrefillWorker
from router.choice import Choice
from router.dispatch import Dispatcher
from router.peers import Pools, WorkerAddress
from router.recovery import Patience
from router.run import Run

HOST = "127.0.0.1"
PAGES = {"prefill": 16, "decode": 32}
STREAMS = 4
CLEAN_END_S = 2.0
RECOVERY_S = 90.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A random Llama of 4 attention and 2 key/value heads that speaks SmolLM2's tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 1.0))
    made = tmp_path_factory.mktemp("random-llama")
    for file in model_folder.iterdir():
        if file.suffix in (".json", ".txt", ".jinja") and file.name not in ("config.json", "generation_config.json"):
            shutil.copy(file, made)
    model.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def works() -> list[Work]:
    """Prompts below, at and above a page and a chunk, and greedy answers."""
    sampling = Sampling(temperature=0.0, max_tokens=24)
    generator = torch.Generator().manual_seed(3)

    def prompt(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(100, 49000, (length,), generator=generator).tolist())

    return [Work(f"r{length}", prompt(length), sampling, 0, 60.0) for length in (1, 16, 45, 128, 300)]


def tokens_of(engine: Engine, works: list[Work]) -> dict[str, list[int]]:
    """All of ``works`` together."""
    tokens: dict[str, list[int]] = {work.request_id: [] for work in works}
    for work in works:
        engine.add(work)
    while engine.has_work:
        for event in engine.step():
            tokens[event.request_id].append(event.token)
    engine.check_integrity()
    return tokens


@pytest.fixture(scope="module")
def expected(folder: Path, works: list[Work]) -> dict[str, list[int]]:
    """One rank, each request by itself."""
    model, pool = load_model(folder, "float32", 1), PoolConfig(kv_tokens=4096)
    alone = [tokens_of(build_engine(model, pool, 2048), [work]) for work in works]
    return {request_id: tokens for one in alone for request_id, tokens in one.items()}


# ---- real workers in this process


def load(folder: Path, pool: PoolConfig) -> tuple[Model, Ranks | None]:
    ranks = start_ranks(folder, "float32", 1, pool, max_context=2048)
    return load_model(folder, "float32", 1, ranks.comm if ranks is not None else None), ranks


def configuration(prefill_ranks: int, decode_ranks: int) -> Config:
    ranks = {"prefill": prefill_ranks, "decode": decode_ranks}
    pools = {
        role: {"tensor_parallel": ranks[role], "page_tokens": PAGES[role], "kv_tokens": 4096, "step_tokens": 100}
        for role in ranks
    }
    return parse({"handoff": {"transport": "tcp"}, **pools})


class House:
    """A prefill worker, a decode worker and a router's dispatcher, joined by real connections."""

    def __init__(self, prefill: PrefillWorker, decode: DecodeWorker) -> None:
        self.prefill, self.decode = prefill, decode
        self.pools = Pools(connect_s=5.0)
        self._dispatcher = Dispatcher(
            Choice(self.pools, decode_page_tokens=PAGES["decode"], disaggregated=True, local_prefill=False),
            Patience(retries=0, wait_s=1.0),
        )

    async def connect(self) -> None:
        for role, worker in (("prefill", self.prefill), ("decode", self.decode)):
            address = WorkerAddress(role, worker.worker_id, HOST, worker.port, worker.generation)  # type: ignore[arg-type]
            self.pools.update(role, [address])  # type: ignore[arg-type]
        async with asyncio.timeout(10):
            while not (self.pools.of("prefill") and self.pools.of("decode")):
                await asyncio.sleep(0.01)

    async def generate(self, work: Work, started: Callable[[], None] = lambda: None) -> list[int]:
        """``started`` is called at every batch of tokens."""
        now_s = time.monotonic()
        run = Run(work, "lossless", arrived_s=now_s, deadline_s=now_s + work.budget_s)
        tokens: list[int] = []
        async with contextlib.aclosing(self._dispatcher.stream(run)) as batches:
            async for batch in batches:
                started()
                tokens += [event.token for event in batch]
        return tokens

    async def idle(self, *workers: PrefillWorker | DecodeWorker) -> None:
        """Returns when ``workers`` hold nothing any more."""
        async with asyncio.timeout(10):
            for worker in workers:
                while (load := worker.load()).pages_used or load.handoffs or load.buffer_bytes_used:
                    await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def house(folder: Path, config: Config) -> AsyncIterator[House]:
    workers: list[Any] = []
    model, ranks = await asyncio.to_thread(load, folder, config.prefill)
    workers.append(await asyncio.to_thread(PrefillWorker, model, config, worker_id="p", host=HOST, ranks=ranks))
    model, ranks = await asyncio.to_thread(load, folder, config.decode)
    workers.append(await asyncio.to_thread(DecodeWorker, model, config, worker_id="d", host=HOST, ranks=ranks))
    both = House(*workers)
    try:
        for worker in workers:
            await worker.start()
        await both.connect()
        yield both
    finally:
        await both.pools.close()
        for worker in workers:
            await worker.close()


@pytest.mark.parametrize(("prefill_ranks", "decode_ranks"), [(2, 1), (1, 2)])
async def test_tokens_cross_between_degrees(
    folder: Path, works: list[Work], expected: dict[str, list[int]], prefill_ranks: int, decode_ranks: int
) -> None:
    async with house(folder, configuration(prefill_ranks, decode_ranks)) as both:
        assert both.prefill.layout.fingerprint == both.decode.layout.fingerprint
        answers = await asyncio.gather(*(both.generate(work) for work in works))
        for work, tokens in zip(works, answers, strict=True):
            assert tokens == expected[work.request_id]
        await both.idle(both.prefill, both.decode)
    assert not [child for child in psutil.Process().children() if "engine.rank_process" in child.cmdline()]


async def test_a_dead_rank_ends_every_stream_of_its_worker(folder: Path) -> None:
    long = Sampling(temperature=0.0, max_tokens=1900)
    works = [Work(f"r{index}", (100 + index, 200), long, 0, 60.0) for index in range(STREAMS)]
    async with house(folder, configuration(1, 2)) as both:
        seen = asyncio.Semaphore(0)
        streams = [asyncio.create_task(both.generate(work, seen.release)) for work in works]
        for _ in range(4 * STREAMS):
            await asyncio.wait_for(seen.acquire(), 20)
        (rank,) = [child for child in psutil.Process().children() if "engine.rank_process" in child.cmdline()]
        rank.kill()
        killed_s = time.monotonic()
        ends = await asyncio.gather(*streams, return_exceptions=True)
        assert time.monotonic() - killed_s < CLEAN_END_S
        for end in ends:
            assert isinstance(end, Unavailable)
            assert "rank 1 is lost" in str(end)
        assert isinstance(both.decode.failure, RankLost)
        assert both.prefill.failure is None
        await both.idle(both.prefill)  # what the other held ends with its process


# ---- the real model


@pytest.mark.slow
def test_smollm2_on_three_ranks(model_folder: Path) -> None:
    """Its heads, MLP and vocabulary all divide by three."""
    prompts = ["The capital of France is", "def fibonacci(n):\n    ", "Once upon a time"]
    from engine.text import Tokenizer

    tokenizer, sampling = Tokenizer(model_folder), Sampling(temperature=0.0, max_tokens=16)
    works = [Work(text[:8], tuple(tokenizer.encode(text)), sampling, 0, 60.0) for text in prompts]
    one = PoolConfig(kv_tokens=2048)
    expected = tokens_of(build_engine(load_model(model_folder, "float32", 1), one, 2048), works)
    three = PoolConfig(kv_tokens=2048, tensor_parallel=3)
    model, ranks = load(model_folder, three)
    engine = build_engine(model, three, 2048, ranks=ranks)
    try:
        assert tokens_of(engine, works) == expected
    finally:
        engine.close()


# ---- a real cluster


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., Any], folder: Path) -> Iterator[Any]:
    with start_cluster(
        "ranks",
        model={"id": str(folder)},
        prefill={"kv_tokens": 4096},
        decode={"kv_tokens": 4096, "page_tokens": 32, "tensor_parallel": 2},
        handoff={"transport": "tcp"},
    ) as client:
        yield client


def ask(client: Any, work: Work) -> list[int]:
    answer = client.generate(
        token_ids=pb.TokenIds(ids=work.prompt),
        sampling=pb.Sampling(temperature=0.0, max_tokens=work.sampling.max_tokens, ignore_eos=True),
    )
    return list(answer.tokens)


def decode_replica(client: Any) -> tuple[str, psutil.Process]:
    """Id and process of the only decode worker."""
    pool = next(pool for pool in client.status().pools if pool.role == "decode")
    port = int(pool.workers[0].address.rpartition(":")[2])
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status != psutil.CONN_LISTEN or not connection.laddr or not connection.pid:
            continue
        if connection.laddr.port == port:
            return pool.workers[0].id, psutil.Process(connection.pid)
    raise AssertionError(f"nobody listens on {port}")


def rank_of(replica: psutil.Process) -> psutil.Process:
    (rank,) = [child for child in replica.children() if "engine.rank_process" in child.cmdline()]
    return rank


@pytest.mark.ray
def test_a_cluster_with_two_decode_ranks(cluster: Any, works: list[Work], expected: dict[str, list[int]]) -> None:
    with ThreadPoolExecutor(len(works)) as pool:
        answers = list(pool.map(lambda work: ask(cluster, work), works))
    assert answers == [expected[work.request_id] for work in works]
    cluster.wait_idle()


@pytest.mark.ray
@pytest.mark.slow
def test_a_rank_killed_under_load(cluster: Any, works: list[Work], expected: dict[str, list[int]]) -> None:
    """Every stream ends cleanly and soon; Serve replaces the whole replica; no process of the old one is left."""
    cluster.wait_ready(1, 1, RECOVERY_S)
    worker_id, replica = decode_replica(cluster)
    rank, started = rank_of(replica), threading.Barrier(STREAMS + 1, timeout=60)

    def run(index: int) -> tuple[float, str]:
        waited: list[int] = []

        def watch(stream: Any, tokens: int) -> None:
            if not waited:
                waited.append(started.wait())

        code, _ = cluster.run(
            watch,
            prompt=f"Story {index}",
            sampling=pb.Sampling(temperature=0.0, max_tokens=1900, ignore_eos=True),
        )
        return time.monotonic(), code

    with ThreadPoolExecutor(STREAMS) as pool:
        runs = [pool.submit(run, index) for index in range(STREAMS)]
        started.wait()
        os.kill(rank.pid, signal.SIGKILL)
        killed_s = time.monotonic()
        for ended_s, code in [run.result() for run in runs]:
            assert code == "UNAVAILABLE"
            assert ended_s - killed_s < CLEAN_END_S

    while (status := cluster.status()) and not any(
        worker.id != worker_id and worker.state == pb.WORKER_STATE_READY
        for pool in status.pools
        if pool.role == "decode"
        for worker in pool.workers
    ):
        assert time.monotonic() - killed_s < RECOVERY_S
        time.sleep(0.2)
    print(f"a new replica serves {time.monotonic() - killed_s:.1f} s after the kill")
    assert ask(cluster, works[2]) == expected[works[2].request_id]
    assert not psutil.wait_procs([replica, rank], timeout=15)[1]
    cluster.wait_idle()
