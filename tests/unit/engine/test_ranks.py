"""A model shared by two real rank processes: the same tokens as one rank, whole KV for the handoff, a clean end."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from baton.errors import ConfigError, ProtocolError
from baton.request import Sampling, TokenEvent
from engine import channel
from engine.attention import Span
from engine.build import load_model
from engine.channel import MESSAGE_BYTES, Channel, Ready
from engine.comm import RankLost
from engine.engine import Chunk, Engine
from engine.model import Model
from engine.ranks import Ranks, require_divisible
from engine.runner import Step
from engine.spec import ModelSpec

ROOT = Path(__file__).resolve().parents[3]
PAGES, PAGE = 128, 4


class Replica:
    """Two ranks and rank 0's slice of the model; one engine after the other may run on them."""

    def __init__(self, folder: Path, *, round_timeout_s: float = 10.0) -> None:
        self.ranks = Ranks(
            folder, ranks=2, dtype="float32", threads=1, pages=PAGES, page_tokens=PAGE, round_timeout_s=round_timeout_s
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
    def process(self) -> psutil.Process:
        """Rank 1."""
        (pid,) = self.ranks.pids
        return psutil.Process(pid)


@pytest.fixture(scope="module")
def pair(tiny_folder: Path) -> Iterator[Replica]:
    replica = Replica(tiny_folder)
    process = replica.process
    yield replica
    replica.ranks.close()
    assert not process.is_running()


@pytest.fixture
def doomed(tiny_folder: Path) -> Iterator[Replica]:
    """For tests after which it is of no use."""
    replica = Replica(tiny_folder, round_timeout_s=2.0)
    yield replica
    replica.ranks.close()


@pytest.mark.parametrize(
    ("pages", "step_tokens"),
    [(PAGES, 256), (PAGES, 7), (18, 32)],
    ids=["whole prompts", "chunks", "preempted"],
)
def test_greedy_tokens_equal_one_ranks(harness: Any, tiny: Model, pair: Replica, pages: int, step_tokens: int) -> None:
    work = [harness.work(f"r{index}", harness.prompt(5 + 6 * index, seed=index)) for index in range(5)]
    engine = pair.engine(pages=pages, step_tokens=step_tokens)
    for one in work:
        engine.add(one)
    events = harness.run(engine)
    if pages < PAGES:
        assert engine.preemptions > 0
    for one in work:
        assert harness.tokens(events[one.request_id]) == harness.alone(tiny, one)


def test_cached_pages_are_shared_and_copied_on_every_rank(harness: Any, tiny: Model, pair: Replica) -> None:
    """The second run finds its whole prompt cached: its last page is copied, since its last token is computed again."""
    engine, work = pair.engine(), harness.work("r", harness.prompt(6 * PAGE, seed=9))
    longer = harness.work("longer", (*work.prompt, *harness.prompt(7, seed=10)))
    for one in (work, work, longer):
        engine.add(one)
        assert harness.tokens(harness.run(engine)[one.request_id]) == harness.alone(tiny, one)
    assert engine.load().hit_tokens >= 2 * (len(work.prompt) - 1)


@pytest.mark.parametrize("seed", range(3))
def test_ranks_stay_together_through_arrivals_cancels_and_preemptions(
    harness: Any, tiny: Model, pair: Replica, seed: int
) -> None:
    """Few pages, prompts that begin alike: every rank shares, copies, gives up and computes again the same pages."""
    chance, engine = random.Random(seed), pair.engine(pages=24, step_tokens=11)
    prefixes = [harness.prompt(length, seed=length) for length in (8, 13, 21)]
    works, tokens = dict[str, Any](), dict[str, list[int]]()
    for turn in range(120):
        if turn < 60 and chance.random() < 0.4:
            tail = harness.prompt(chance.randrange(12), seed=chance.randrange(1000))
            work = harness.work(f"r{turn}", chance.choice(prefixes) + tail, priority=chance.randrange(3))
            works[work.request_id], tokens[work.request_id] = work, []
            engine.add(work)
        if works and chance.random() < 0.05:
            cancelled = chance.choice(list(works))
            if engine.release(cancelled):
                del works[cancelled]
        for event in engine.step():
            tokens[event.request_id].append(event.token)
        engine.check_integrity()
    for request_id, events in harness.run(engine).items():
        tokens[request_id] += [event.token for event in events]
    assert engine.preemptions > 0
    assert len(works) > 10
    for request_id, work in works.items():
        assert tokens[request_id] == harness.alone(tiny, work), request_id


def test_drawn_tokens_and_logprobs_equal_one_ranks(harness: Any, tiny: Model, pair: Replica) -> None:
    """Rank 0 sees the logits of the whole vocabulary."""
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=5, max_tokens=10, logprobs=True, top_logprobs=5)
    results: list[list[TokenEvent]] = []
    for engine in (harness.engine(tiny), pair.engine()):
        engine.add(harness.work("r", harness.prompt(20), sampling))
        results.append(harness.run(engine)["r"])
    for expected, got in zip(*results, strict=True):
        assert got.token == expected.token
        assert got.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert [one.token for one in got.top] == [one.token for one in expected.top]


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


def prefill(harness: Any, make: Callable[[Collector], Engine], prompt: list[int]) -> tuple[Collector, TokenEvent]:
    collector = Collector()
    collector.engine = make(collector)
    collector.engine.add(harness.work("r", prompt), prefill_only=True)
    first = harness.run(collector.engine)["r"][0]
    collector.engine.release("r")
    return collector, first


@pytest.mark.parametrize(("sender_ranks", "receiver_ranks"), [(2, 1), (1, 2)])
def test_kv_written_by_some_ranks_is_decoded_by_others(
    harness: Any, tiny: Model, pair: Replica, sender_ranks: int, receiver_ranks: int
) -> None:
    """The KV that leaves has all heads in order, layer by layer while the step still runs, and lands as it left."""

    def make(ranks: int, observer: Collector | None = None) -> Engine:
        if ranks == 2:
            return pair.engine(step_tokens=9, observer=observer)
        engine: Engine = harness.engine(tiny, step_tokens=9, observer=observer)
        return engine

    prompt = harness.prompt(23)
    collector, first = prefill(harness, lambda observer: make(sender_ranks, observer), prompt)
    expected, _ = prefill(harness, lambda observer: make(1, observer), prompt)
    assert len(collector.parts) == tiny.spec.layers * 3
    for (layer, start, keys, values), (layer_, start_, keys_, values_) in zip(
        collector.parts, expected.parts, strict=True
    ):
        assert (layer, start) == (layer_, start_)
        torch.testing.assert_close(keys, keys_, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values, values_, atol=1e-4, rtol=1e-4)

    engine, work = make(receiver_ranks), harness.work("r", prompt)
    pages = engine.reserve(work)
    for layer, start, keys, values in collector.parts:
        engine.cache.scatter(layer, pages, start, keys, values)
    engine.start("r", first)
    rest = harness.tokens(harness.run(engine)["r"])
    assert [first.token, *rest] == harness.alone(tiny, work)


def test_a_stopped_rank_fails_the_step_and_is_ended(harness: Any, doomed: Replica) -> None:
    engine = doomed.engine()
    engine.add(harness.work("r", harness.prompt(10), Sampling(temperature=0.0, max_tokens=200)))
    engine.step()
    process = doomed.process
    process.suspend()
    stopped_s = time.monotonic()
    with pytest.raises(RankLost, match=r"rank 1 is lost: .* behind for 2 s"):
        harness.run(engine)
    assert time.monotonic() - stopped_s < 6.0
    engine.close()
    assert not process.is_running()


def test_a_death_is_reported_while_idle_to_who_asks_later_and_by_the_next_step(harness: Any, doomed: Replica) -> None:
    engine, told, told_late = doomed.engine(), threading.Event(), list[BaseException]()
    engine.watch(lambda error: told.set())
    doomed.process.kill()
    assert told.wait(5.0)
    engine.watch(told_late.append)
    (lost,) = told_late
    assert isinstance(lost, RankLost)
    assert lost.rank == 1
    assert "ended with -9" in str(lost)
    engine.add(harness.work("r", harness.prompt(10)))
    with pytest.raises(RankLost, match="rank 1 is lost: its process ended with -9"):
        engine.step()


PARENT = """
import sys, time
from pathlib import Path
from engine.ranks import Ranks
ranks = Ranks(Path(sys.argv[1]), ranks=2, dtype="float32", threads=1, pages=8, page_tokens=4)
ranks.await_ready()
print("ready", flush=True)
time.sleep(60)
"""


def test_ranks_die_with_rank_0_even_when_they_are_stopped(tiny_folder: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tiny_folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        (child,) = psutil.Process(parent.pid).children()
        child.suspend()
        os.kill(parent.pid, signal.SIGKILL)
        assert not psutil.wait_procs([child], timeout=5.0)[1]
    finally:
        parent.kill()
        parent.communicate(timeout=10)


def test_a_rank_that_cannot_load_fails_the_start(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    ranks = Ranks(tmp_path, ranks=2, dtype="float32", threads=1, pages=8, page_tokens=4)
    try:
        with pytest.raises(RankLost, match="rank 1 is lost: it ended while it loaded the model"):
            ranks.await_ready()
    finally:
        ranks.close()


def test_what_cannot_be_shared_is_named(tiny_folder: Path) -> None:
    spec = ModelSpec.from_folder(tiny_folder)
    require_divisible(spec, 2)
    with pytest.raises(ConfigError, match="tensor_parallel: 4 ranks cannot share 6 attention heads evenly"):
        require_divisible(spec, 4)
    with pytest.raises(ConfigError, match="3 ranks cannot share 2 key/value heads evenly"):
        Ranks(tiny_folder, ranks=3, dtype="float32", threads=1, pages=8, page_tokens=4)


# ---- the channel


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with Channel(ours, peer="rank 1") as first, Channel(theirs, peer="rank 0") as second:
        yield first, second


@pytest.mark.parametrize("tokens", [0, 1, 5, 40_000, 200_000])
def test_a_step_of_any_length_arrives_as_it_was_sent(ends: tuple[Channel, Channel], tokens: int) -> None:
    step = Step(tuple(range(tokens)), (0, tokens), (Span(0, 1, (3, 4)), Span(7, tokens, ())), 1)
    sender = threading.Thread(target=ends[0].send, args=(step,))  # longer ones exceed what the socket holds
    sender.start()
    assert ends[1].receive(5.0) == step
    sender.join(5.0)


def test_nothing_comes_and_the_end(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(TimeoutError):
        ends[1].receive(0.05)
    ends[0].send(Ready(1))
    ends[0].close()
    assert ends[1].receive(1.0) == Ready(1)
    assert ends[1].receive(1.0) is None
    with pytest.raises(OSError, match="Broken pipe"):
        ends[1].send(Ready(1))


def test_who_takes_nothing_is_not_waited_for_forever(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "SEND_TIMEOUT_S", 0.1)
    with pytest.raises(TimeoutError):
        ends[0].send_packed(b"x" * (64 * MESSAGE_BYTES))


def test_endless_records_are_refused(ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MAX_RECORD_BYTES", MESSAGE_BYTES)
    sender = threading.Thread(target=ends[0].send_packed, args=(b"x" * (2 * MESSAGE_BYTES),))
    sender.start()
    with pytest.raises(ProtocolError, match="rank 0 sent more than"):
        ends[1].receive(1.0)
    sender.join(5.0)
