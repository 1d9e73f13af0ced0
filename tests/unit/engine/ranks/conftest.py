"""Replicas of real rank processes over a small random Llama that two and four ranks can share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from baton.request import TokenEvent
from engine.build import load_model
from engine.devices import Means
from engine.engine import Chunk, Engine
from engine.model import Model
from engine.ranks import Ranks

if TYPE_CHECKING:
    from tests.unit.engine.conftest import Harness

PAGES, PAGE = 128, 4


class Replica:
    """Some ranks and rank 0's slice of the model; one engine after the other may run on them."""

    def __init__(self, folder: Path, ranks: int, means: Means, *, round_timeout_s: float = 10.0) -> None:
        self.ranks = Ranks(
            folder,
            ranks=ranks,
            dtype="float32",
            threads=1,
            pages=PAGES,
            page_tokens=PAGE,
            means=means,
            round_timeout_s=round_timeout_s,
        )
        try:
            self.model = load_model(folder, "float32", 1, self.ranks.comm)
            self.ranks.await_ready()
        except BaseException:
            self.ranks.close()
            raise

    def engine(self, *, pages: int = PAGES, step_tokens: int = 32, observer: Any = None) -> Engine:
        return Engine(
            self.model,
            page_tokens=PAGE,
            pages=pages,
            step_tokens=step_tokens,
            max_running=16,
            max_waiting=64,
            observer=observer,
            ranks=self.ranks,
        )

    @property
    def processes(self) -> list[psutil.Process]:
        """Of ranks 1, 2, ..."""
        return [psutil.Process(pid) for pid in self.ranks.pids]


class Collector:
    """Gathers every layer's KV the moment it is announced, as a sender does."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.parts: list[tuple[int, int, torch.Tensor, torch.Tensor]] = []

    def layer_written(self, layer: int, chunks: Sequence[Chunk]) -> None:
        assert self.engine is not None
        for chunk in chunks:
            keys, values = self.engine.cache.gather(layer, chunk.pages, chunk.start, chunk.count)
            self.parts.append((layer, chunk.start, keys, values))


class Handover:
    """From prefill on one engine to decode on another."""

    def __init__(self, harness: Harness) -> None:
        self._harness = harness

    def prefill(self, make: Callable[[Collector], Engine], prompt: list[int]) -> tuple[Collector, TokenEvent]:
        """All KV of ``prompt``, and its first token. ``make`` returns an engine with the observer it is given."""
        collector = Collector()
        collector.engine = make(collector)
        collector.engine.add(self._harness.work("r", prompt), prefill_only=True)
        first = self._harness.run(collector.engine)["r"][0]
        collector.engine.release("r")
        return collector, first

    def decode(self, engine: Engine, prompt: list[int], collector: Collector, first: TokenEvent) -> list[int]:
        """All tokens, of which ``engine`` computes those after the first."""
        pages = engine.reserve(self._harness.work("r", prompt))
        for layer, start, keys, values in collector.parts:
            engine.cache.scatter(layer, pages, start, keys, values)
        engine.start("r", first)
        return [first.token, *self._harness.tokens(self._harness.run(engine)["r"])]


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory: pytest.TempPathFactory, harness: Harness) -> Path:
    """Eight attention and four key/value heads."""
    folder = tmp_path_factory.mktemp("wide-llama")
    return harness.save_llama(folder, hidden_size=64, num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture(scope="session")
def wide(wide_folder: Path) -> Model:
    return load_model(wide_folder, "float32", 1)


@pytest.fixture(scope="session")
def handover(harness: Harness) -> Handover:
    return Handover(harness)


@pytest.fixture(scope="session")
def start_replica(wide_folder: Path) -> Callable[..., Replica]:
    """``start_replica(ranks, means)``; whoever calls it closes its ranks."""

    def start(ranks: int, means: Means, **options: Any) -> Replica:
        return Replica(wide_folder, ranks, means, **options)

    return start


@pytest.fixture(scope="module", params=["shared", "gloo"])
def pair(request: pytest.FixtureRequest, start_replica: Callable[..., Replica]) -> Iterator[Replica]:
    """Two ranks, with caches in shared memory or each its own."""
    replica = start_replica(2, request.param)
    processes = replica.processes
    yield replica
    replica.ranks.close()
    assert not any(process.is_running() for process in processes)


@pytest.fixture(params=["shared", "gloo"])
def doomed(request: pytest.FixtureRequest, start_replica: Callable[..., Replica]) -> Iterator[Replica]:
    """For tests after which it is of no use."""
    replica = start_replica(2, request.param, round_timeout_s=2.0)
    yield replica
    replica.ranks.close()
