"""Replicas of two and four ranks with caches of their own, as on GPUs: the same tokens as one rank, whatever hands over
to whatever; a rank that dies or stops ends all of it, soon and by name."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from baton.request import Sampling
from engine import private_cache
from engine.comm import RankLost
from engine.engine import Chunk, Engine
from engine.model import Model
from engine.private_cache import PrivateKVCaches

if TYPE_CHECKING:
    from tests.unit.engine.conftest import Harness
    from tests.unit.engine.ranks.conftest import Handover, Replica

PAGES = 128


@pytest.fixture(scope="module")
def replicas(start_replica: Callable[..., Replica]) -> Iterator[dict[int, Replica]]:
    """By degree."""
    made: dict[int, Replica] = {}
    try:
        for ranks in (2, 4):
            made[ranks] = start_replica(ranks, "gloo")
        yield made
    finally:
        for replica in made.values():
            replica.ranks.close()


@pytest.fixture
def make(harness: Harness, wide: Model, replicas: dict[int, Replica]) -> Callable[..., Engine]:
    """An engine of some degree."""

    def engine(ranks: int, observer: Any = None, step_tokens: int = 9, pages: int = PAGES) -> Engine:
        if ranks == 1:
            return harness.engine(wide, step_tokens=step_tokens, observer=observer, pages=pages)
        return replicas[ranks].engine(step_tokens=step_tokens, observer=observer, pages=pages)

    return engine


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("room", [(PAGES, 256), (18, 7)], ids=["whole prompts", "preempted chunks"])
def test_greedy_tokens_equal_one_ranks(
    harness: Harness, wide: Model, make: Callable[..., Engine], ranks: int, room: tuple[int, int]
) -> None:
    pages, step_tokens = room
    works = [harness.work(f"r{index}", harness.prompt(5 + 6 * index, seed=index)) for index in range(5)]
    engine = make(ranks, pages=pages, step_tokens=step_tokens)
    assert isinstance(engine.cache, PrivateKVCaches)
    for work in works:
        engine.add(work)
    events = harness.run(engine)
    assert engine.preemptions > 0 or pages == PAGES
    for work in works:
        assert harness.tokens(events[work.request_id]) == harness.alone(wide, work)


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2), (2, 4), (4, 2), (1, 4), (4, 1), (4, 4)], ids=str)
def test_any_degree_hands_over_to_any_other(
    harness: Harness, wide: Model, make: Callable[..., Engine], handover: Handover, degrees: tuple[int, int]
) -> None:
    prompt = harness.prompt(31, seed=sum(degrees))
    collector, first = handover.prefill(lambda observer: make(degrees[0], observer), prompt)
    tokens = handover.decode(make(degrees[1]), prompt, collector, first)
    assert tokens == harness.alone(wide, harness.work("r", prompt))


class Encoder:
    """Copies announced KV on a thread of its own while the step goes on, as a sender does."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.parts: list[tuple[int, int, torch.Tensor, torch.Tensor]] = []
        self._announced: queue.SimpleQueue[tuple[int, Chunk] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def layer_written(self, layer: int, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self._announced.put((layer, chunk))

    def finish(self) -> None:
        self._announced.put(None)
        self._thread.join(30.0)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while (announced := self._announced.get()) is not None:
            layer, chunk = announced
            assert self.engine is not None
            self.parts.append(
                (layer, chunk.start, *self.engine.cache.gather(layer, chunk.pages, chunk.start, chunk.count))
            )


@pytest.mark.parametrize("ranks", [2, 4])
def test_kv_leaves_while_steps_go_on(
    harness: Harness, make: Callable[..., Engine], handover: Handover, ranks: int
) -> None:
    """Others decode meanwhile, so that the ranks are never at rest."""
    prompt, encoder = harness.prompt(61, seed=7), Encoder()
    engine = encoder.engine = make(ranks, encoder)
    for index in range(3):
        engine.add(harness.work(f"d{index}", harness.prompt(4, seed=index)))
    engine.add(harness.work("r", prompt), prefill_only=True)
    harness.run(engine)
    encoder.finish()
    engine.release("r")
    expected, _ = handover.prefill(lambda observer: make(1, observer, 64), prompt)
    parts = sorted(encoder.parts, key=lambda part: part[:2])
    for layer, _, keys, values in expected.parts:
        own = [part for part in parts if part[0] == layer]
        torch.testing.assert_close(torch.cat([part[2] for part in own]), keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.cat([part[3] for part in own]), values, atol=1e-4, rtol=1e-4)


def test_kv_lands_while_steps_go_on(
    harness: Harness, wide: Model, make: Callable[..., Engine], handover: Handover
) -> None:
    prompt, long = harness.prompt(40, seed=11), Sampling(temperature=0.0, max_tokens=150)
    collector, first = handover.prefill(lambda observer: make(1, observer), prompt)
    engine = make(2)
    pages = engine.reserve(harness.work("r", prompt))
    other = harness.work("d", harness.prompt(6), long)
    engine.add(other)

    def land(parts: list[Any]) -> None:
        for layer, start, keys, values in parts:
            engine.cache.scatter(layer, pages, start, keys, values)

    landing = threading.Thread(target=land, args=(collector.parts,))
    landing.start()
    tokens: dict[str, list[int]] = {"r": [first.token], "d": []}
    started = False
    while engine.has_work or not started:
        if not started and not landing.is_alive():
            engine.start("r", first)
            started = True
        for event in engine.step():
            tokens[event.request_id].append(event.token)
    landing.join(10.0)
    assert tokens["r"] == harness.alone(wide, harness.work("r", prompt))
    assert tokens["d"] == harness.alone(wide, other)


def test_a_dead_rank_among_four_is_the_one_that_is_named(
    harness: Harness, start_replica: Callable[..., Replica]
) -> None:
    """The others lose their connections to it and could be taken for the cause."""
    four = start_replica(4, "gloo", round_timeout_s=5.0)
    try:
        engine = four.engine()
        engine.add(harness.work("r", harness.prompt(10), Sampling(temperature=0.0, max_tokens=200)))
        engine.step()
        four.processes[1].kill()
        killed_s = time.monotonic()
        with pytest.raises(RankLost, match="rank 2 is lost: its process ended with -9"):
            harness.run(engine)
        assert time.monotonic() - killed_s < 4.0
        with pytest.raises(RankLost, match="rank 2"):
            engine.cache.gather(0, (0,), 0, 1)
    finally:
        four.ranks.close()


def _stop(process: psutil.Process) -> None:
    """On a busy machine its other threads may go on until the one that was told has its turn."""
    process.suspend()
    deadline_s = time.monotonic() + 30.0
    while any(task.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "T" for task in _tasks(process)):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def _tasks(process: psutil.Process) -> list[Path]:
    return list(Path(f"/proc/{process.pid}/task").iterdir())


def test_a_rank_that_stops_while_idle_is_found_by_a_copy(
    start_replica: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_cache, "COPY_TIMEOUT_S", 0.5)
    two = start_replica(2, "gloo")
    try:
        engine, told = two.engine(), list[BaseException]()
        engine.watch(told.append)
        engine.cache.gather(0, (0,), 0, 4)
        _stop(two.processes[0])
        with pytest.raises(RankLost, match=r"rank 1 is lost: no copy after 0\.5 s"):
            engine.cache.gather(0, (0,), 0, 4)
        assert [str(error) for error in told] == ["rank 1 is lost: no copy after 0.5 s: TimeoutError('timed out')"]
    finally:
        two.ranks.close()
