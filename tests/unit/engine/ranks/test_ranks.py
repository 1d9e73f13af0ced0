"""A model shared by two real rank processes: the same tokens as one rank, whole KV for the handoff, a clean end.

Twice: with sums and caches in shared memory, and with gloo and caches of each rank's own, as on GPUs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from baton.errors import ConfigError, Unavailable
from baton.request import Sampling, TokenEvent
from engine.comm import RankLost
from engine.engine import Engine
from engine.model import Model
from engine.ranks import Ranks, require_divisible
from engine.spec import ModelSpec

if TYPE_CHECKING:
    from tests.unit.engine.ranks.conftest import Collector, Handover, Replica

ROOT = Path(__file__).resolve().parents[4]
PAGES, PAGE = 128, 4


@pytest.mark.parametrize(
    ("pages", "step_tokens"),
    [(PAGES, 256), (PAGES, 7), (18, 32)],
    ids=["whole prompts", "chunks", "preempted"],
)
def test_greedy_tokens_equal_one_ranks(harness: Any, wide: Model, pair: Replica, pages: int, step_tokens: int) -> None:
    work = [harness.work(f"r{index}", harness.prompt(5 + 6 * index, seed=index)) for index in range(5)]
    engine = pair.engine(pages=pages, step_tokens=step_tokens)
    for one in work:
        engine.add(one)
    events = harness.run(engine)
    if pages < PAGES:
        assert engine.preemptions > 0
    for one in work:
        assert harness.tokens(events[one.request_id]) == harness.alone(wide, one)


def test_cached_pages_are_shared_and_copied_on_every_rank(harness: Any, wide: Model, pair: Replica) -> None:
    """The second run finds its whole prompt cached: its last page is copied, since its last token is computed again."""
    engine, work = pair.engine(), harness.work("r", harness.prompt(6 * PAGE, seed=9))
    longer = harness.work("longer", (*work.prompt, *harness.prompt(7, seed=10)))
    for one in (work, work, longer):
        engine.add(one)
        assert harness.tokens(harness.run(engine)[one.request_id]) == harness.alone(wide, one)
    assert engine.load().hit_tokens >= 2 * (len(work.prompt) - 1)


@pytest.mark.parametrize("seed", range(3))
def test_ranks_stay_together_through_arrivals_cancels_and_preemptions(
    harness: Any, wide: Model, pair: Replica, seed: int
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
        assert tokens[request_id] == harness.alone(wide, work), request_id


def test_drawn_tokens_and_logprobs_equal_one_ranks(harness: Any, wide: Model, pair: Replica) -> None:
    """Rank 0 sees the logits of the whole vocabulary."""
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=5, max_tokens=10, logprobs=True, top_logprobs=5)
    results: list[list[TokenEvent]] = []
    for engine in (harness.engine(wide), pair.engine()):
        engine.add(harness.work("r", harness.prompt(20), sampling))
        results.append(harness.run(engine)["r"])
    for expected, got in zip(*results, strict=True):
        assert got.token == expected.token
        assert got.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert [one.token for one in got.top] == [one.token for one in expected.top]


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2)])
def test_kv_written_by_some_ranks_is_decoded_by_others(
    harness: Any, wide: Model, pair: Replica, handover: Handover, degrees: tuple[int, int]
) -> None:
    """The KV that leaves has all heads in order, layer by layer while the step still runs, and lands as it left."""

    def make(ranks: int, observer: Collector | None = None) -> Engine:
        if ranks == 2:
            return pair.engine(step_tokens=9, observer=observer)
        engine: Engine = harness.engine(wide, step_tokens=9, observer=observer)
        return engine

    prompt = harness.prompt(23)
    collector, first = handover.prefill(lambda observer: make(degrees[0], observer), prompt)
    expected, _ = handover.prefill(lambda observer: make(1, observer), prompt)
    assert len(collector.parts) == wide.spec.layers * 3
    for (layer, start, keys, values), (layer_, start_, keys_, values_) in zip(
        collector.parts, expected.parts, strict=True
    ):
        assert (layer, start) == (layer_, start_)
        torch.testing.assert_close(keys, keys_, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values, values_, atol=1e-4, rtol=1e-4)
    tokens = handover.decode(make(degrees[1]), prompt, collector, first)
    assert tokens == harness.alone(wide, harness.work("r", prompt))


def test_a_stopped_rank_fails_the_step_and_is_ended(harness: Any, doomed: Replica) -> None:
    engine = doomed.engine()
    engine.add(harness.work("r", harness.prompt(10), Sampling(temperature=0.0, max_tokens=200)))
    engine.step()
    (process,) = doomed.processes
    process.suspend()
    stopped_s = time.monotonic()
    with pytest.raises(RankLost, match=r"rank 1 is lost: .* behind for 2 s|a rank is lost: .*Timed out waiting 2000ms"):
        harness.run(engine)
    assert time.monotonic() - stopped_s < 6.0
    engine.close()
    assert not process.is_running()


def test_a_death_is_reported_while_idle_to_who_asks_later_and_by_the_next_step(harness: Any, doomed: Replica) -> None:
    engine, told, told_late = doomed.engine(), threading.Event(), list[BaseException]()
    engine.watch(lambda error: told.set())
    doomed.processes[0].kill()
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


def test_ranks_die_with_rank_0_even_when_they_are_stopped(wide_folder: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(wide_folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
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


def test_a_rank_that_cannot_load_fails_the_start(tmp_path: Path, wide_folder: Path) -> None:
    (tmp_path / "config.json").write_text((wide_folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    ranks = Ranks(tmp_path, ranks=2, dtype="float32", threads=1, pages=8, page_tokens=4)
    try:
        with pytest.raises(RankLost, match="rank 1 is lost: it ended while it loaded the model"):
            ranks.await_ready()
    finally:
        ranks.close()


def test_what_cannot_be_shared_is_named(wide_folder: Path) -> None:
    spec = ModelSpec.from_folder(wide_folder)
    require_divisible(spec, 2)
    with pytest.raises(ConfigError, match="tensor_parallel: 3 ranks cannot share 8 attention heads evenly"):
        require_divisible(spec, 3)
    with pytest.raises(ConfigError, match="8 ranks cannot share 4 key/value heads evenly"):
        Ranks(wide_folder, ranks=8, dtype="float32", threads=1, pages=8, page_tokens=4)


def test_what_cannot_work_starts_no_process(wide_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    common: dict[str, Any] = {"dtype": "float32", "threads": 1, "pages": 8, "page_tokens": 4}
    descriptors = len(os.listdir("/proc/self/fd"))
    (tmp_path / "config.json").write_text((wide_folder / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"model\.id: .* has no \.safetensors file"):
        Ranks(tmp_path, ranks=2, **common)
    with monkeypatch.context() as other:
        other.setattr("platform.machine", lambda: "aarch64")
        with pytest.raises(ConfigError, match="needs x86-64"):
            Ranks(wide_folder, ranks=2, means="shared", **common)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_rank_that_cannot_start_takes_the_others_with_it(wide_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = subprocess.Popen, list[Any]()

    def second_fails(*arguments: Any, **options: Any) -> Any:
        if started:
            raise OSError("no more processes")
        started.append(start(*arguments, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", second_fails)
    with pytest.raises(Unavailable, match="cannot start rank 2: no more processes"):
        Ranks(wide_folder, ranks=4, dtype="float32", threads=1, pages=8, page_tokens=4)
    assert started[0].poll() is not None
