"""Sums through shared memory: right, the same on every rank, bounded in every wait."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.errors import ConfigError, Unavailable
from engine.comm import Alone, RankLost
from engine.shared_reduce import PIECE_BYTES, SharedReduce, create_shared, map_shared, shared_bytes

ROOT = Path(__file__).resolve().parents[4]
PIECE = PIECE_BYTES // 4  # float32 values

PEER = """
import sys, torch
from engine.shared_reduce import SharedReduce, map_shared
torch.set_num_threads(1)
descriptor, rank, ranks, rounds, rows = map(int, sys.argv[1:])
comm = SharedReduce(map_shared(descriptor), rank=rank, ranks=ranks)
print("ready", flush=True)
generator = torch.Generator().manual_seed(rank)
total = torch.zeros(rows, 64)
for _ in range(rounds):
    total += comm.all_reduce(torch.randn(rows, 64, generator=generator))
print(total.double().sum().item(), flush=True)
"""


class Group:
    """One piece of shared memory and the ranks on it."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.descriptor = ranks, create_shared(shared_bytes(ranks))

    def comm(self, rank: int, **options: Any) -> SharedReduce:
        return SharedReduce(map_shared(self.descriptor), rank=rank, ranks=self.ranks, **options)

    def together(self, act: Callable[[SharedReduce], Any]) -> list[Any]:
        """``act`` on every rank at once, a thread each; what each returned."""
        with ThreadPoolExecutor(self.ranks) as pool:
            return list(pool.map(lambda rank: act(self.comm(rank)), range(self.ranks)))

    def process(self, rank: int, rounds: int, rows: int = 1) -> subprocess.Popen[str]:
        """A rank in a process of its own, which has said that it is ready."""
        process = subprocess.Popen(
            [sys.executable, "-c", PEER, *map(str, (self.descriptor, rank, self.ranks, rounds, rows))],
            pass_fds=(self.descriptor,), stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    def close(self) -> None:
        os.close(self.descriptor)


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Any:
    made = Group(getattr(request, "param", 2))
    yield made
    made.close()


def summand(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.parametrize("group", [2, 3, 4], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 48), (1, 48), (7, 576), (PIECE,), (PIECE + 1,), (3, PIECE - 5)], ids=str)
def test_every_rank_gets_the_sum_in_the_order_of_ranks(
    group: Group, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    expected = summand(0, shape, dtype)
    for rank in range(1, group.ranks):
        expected = expected + summand(rank, shape, dtype)
    for got in group.together(lambda comm: comm.all_reduce(summand(comm.rank, shape, dtype))):
        assert got.dtype == dtype
        assert torch.equal(got, expected)


def test_the_sum_is_made_in_place_when_it_can_be(group: Group) -> None:
    def act(comm: SharedReduce) -> tuple[bool, torch.Tensor]:
        whole, sliced = torch.ones(4, 6), torch.ones(4, 12)[:, ::2]
        return comm.all_reduce(whole).data_ptr() == whole.data_ptr(), comm.all_reduce(sliced)

    for in_place, strided in group.together(act):
        assert in_place
        assert torch.equal(strided, torch.full((4, 6), 2.0))


@pytest.mark.parametrize("group", [2, 3], indirect=True)
@pytest.mark.parametrize("shape", [(0, 160), (1, 160), (5, 16384), (70, 1000), (2, PIECE + 3)], ids=str)
def test_rank_0_gathers_side_by_side(group: Group, shape: tuple[int, int]) -> None:
    parts = [summand(rank, shape, torch.float32) for rank in range(group.ranks)]
    first, *others = group.together(lambda comm: comm.gather(parts[comm.rank]))
    assert torch.equal(first, torch.cat(parts, dim=1))
    for rank, got in enumerate(others, start=1):
        assert torch.equal(got, parts[rank])


def test_rounds_of_all_kinds_in_a_row(group: Group) -> None:
    """The sender of a gather does not wait: it must not overwrite what rank 0 has yet to read."""

    def act(comm: SharedReduce) -> list[torch.Tensor]:
        results = []
        for turn in range(300):
            if comm.rank == 0 and turn % 50 == 0:
                time.sleep(0.002)  # the others run ahead as far as they may
            mine = torch.full((2, 8), float(turn * 10 + comm.rank))
            results.append(comm.gather(mine) if turn % 3 else comm.all_reduce(mine))
        return results

    first, second = group.together(act)
    for turn, (got, other) in enumerate(zip(first, second, strict=True)):
        low, high = turn * 10.0, turn * 10.0 + 1.0
        if turn % 3:
            assert torch.equal(got, torch.tensor([[low] * 8 + [high] * 8] * 2))
        else:
            assert torch.equal(got, torch.full((2, 8), low + high))
            assert torch.equal(other, got)


def test_thousands_of_rounds_between_processes(group: Group) -> None:
    rounds, rows = 5000, 3
    process = group.process(1, rounds, rows)
    comm, generators = group.comm(0), [torch.Generator().manual_seed(rank) for rank in (0, 1)]
    total = torch.zeros(rows, 64)
    for turn in range(rounds):
        mine, theirs = (torch.randn(rows, 64, generator=generator) for generator in generators)
        expected = mine + theirs
        got = comm.all_reduce(mine)
        assert torch.equal(got, expected), turn
        total += got
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert json.loads(out) == total.double().sum().item()


def test_a_missing_rank_is_named_in_time(group: Group) -> None:
    started_s = time.monotonic()
    with pytest.raises(RankLost, match=r"rank 1 is lost: 1 rounds behind for 0\.3 s") as lost:
        group.comm(0, timeout_s=0.3).all_reduce(torch.ones(1, 8))
    assert 0.3 <= time.monotonic() - started_s < 2.0
    assert lost.value.rank == 1


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_stopped_or_dead_rank_is_named_in_time(group: Group, number: signal.Signals) -> None:
    process = group.process(1, rounds=10**9)
    comm = group.comm(0, timeout_s=0.5)
    for _ in range(50):
        comm.all_reduce(torch.ones(1, 64))
    os.kill(process.pid, number)
    time.sleep(0.05)
    try:
        started_s = time.monotonic()
        with pytest.raises(RankLost, match="rank 1"):
            comm.all_reduce(torch.ones(3 * PIECE))  # several rounds: the one under way may still be finished
        assert time.monotonic() - started_s < 2.0
    finally:
        process.kill()
        process.communicate(timeout=10)


def test_a_wait_asks_whether_the_peer_lives(group: Group) -> None:
    asked = threading.Event()

    def check() -> None:
        asked.set()
        raise RankLost(1, "its process ended")

    started_s = time.monotonic()
    with pytest.raises(RankLost, match="its process ended"):
        group.comm(0, check_peers=check, timeout_s=30).all_reduce(torch.ones(1, 8))
    assert asked.is_set()
    assert time.monotonic() - started_s < 1.0


def test_a_rank_that_comes_late_is_waited_for(group: Group) -> None:
    def act(comm: SharedReduce) -> torch.Tensor:
        time.sleep(0.3 * comm.rank)
        return comm.all_reduce(torch.ones(1, 8))

    assert all(torch.equal(got, torch.full((1, 8), 2.0)) for got in group.together(act))


def test_other_processors_are_refused(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(ConfigError, match="tensor_parallel: needs x86-64 on CPU, this is aarch64"):
        group.comm(0)


def test_alone_is_the_whole() -> None:
    part = torch.ones(2, 3)
    assert Alone().all_reduce(part) is part
    assert Alone().gather(part) is part


def test_a_lost_rank_is_unavailable() -> None:
    assert issubclass(RankLost, Unavailable)
