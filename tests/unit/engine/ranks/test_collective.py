"""Sums over torch.distributed: right on every rank, on loopback only, bounded in every wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch

from engine import collective
from engine.collective import Collective
from engine.comm import RankLost

CPU = torch.device("cpu")


class Group:
    """Ranks of one group, a thread each, of this one process."""

    def __init__(self, ranks: int, timeout_s: float, check_peers: Callable[[], None] | None = None) -> None:
        self.comms = [
            Collective(rank=rank, ranks=ranks, device=CPU, timeout_s=timeout_s, check_peers=check_peers)
            for rank in range(ranks)
        ]
        port = self.comms[0].listen()
        self.together(lambda comm: comm.connect(port))

    def together(self, act: Callable[[Collective], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.comms)) as pool:
            return list(pool.map(act, self.comms))

    def close(self) -> None:
        for comm in self.comms:
            comm.close()


@pytest.fixture(scope="module", params=[2, 4])
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    made = Group(request.param, timeout_s=20.0)
    yield made
    made.close()


@pytest.fixture
def doomed() -> Iterator[Group]:
    made = Group(2, timeout_s=0.4)
    yield made
    made.close()


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 48), (1, 48), (7, 576), (300, 1000)], ids=str)
def test_every_rank_gets_the_same_sum(group: Group, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    exact = sum(part(comm.rank, shape, dtype).double() for comm in group.comms)
    sums = group.together(lambda comm: comm.all_reduce(part(comm.rank, shape, dtype)))
    for got in sums:
        assert got.dtype == dtype
        assert torch.equal(got, sums[0])
        assert got.shape == shape
    torch.testing.assert_close(sums[0].double(), exact, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_the_sum_is_made_in_place_when_it_can_be(group: Group) -> None:
    def act(comm: Collective) -> tuple[bool, torch.Tensor]:
        whole, sliced = torch.ones(4, 6), torch.ones(4, 12)[:, ::2]
        return comm.all_reduce(whole).data_ptr() == whole.data_ptr(), comm.all_reduce(sliced)

    for in_place, strided in group.together(act):
        assert in_place
        assert torch.equal(strided, torch.full((4, 6), float(len(group.comms))))


@pytest.mark.parametrize("shape", [(0, 160), (1, 160), (5, 1600)], ids=str)
def test_rank_0_gathers_side_by_side(group: Group, shape: tuple[int, int]) -> None:
    parts = [part(comm.rank, shape) for comm in group.comms]
    first, *others = group.together(lambda comm: comm.gather(parts[comm.rank]))
    assert torch.equal(first, torch.cat(parts, dim=1))
    for rank, got in enumerate(others, start=1):
        assert torch.equal(got, parts[rank])


def test_rounds_of_all_kinds_in_a_row(group: Group) -> None:
    def act(comm: Collective) -> list[torch.Tensor]:
        results = []
        for turn in range(60):
            if comm.rank == 0 and turn % 20 == 0:
                time.sleep(0.01)  # the others run ahead as far as they may
            mine = torch.full((2, 8), float(turn * 10 + comm.rank))
            results.append(comm.gather(mine) if turn % 3 else comm.all_reduce(mine))
        comm.settle()
        return results

    ranks = len(group.comms)
    for turn, got in enumerate(group.together(act)[0]):
        values = [turn * 10.0 + rank for rank in range(ranks)]
        expected = [[value for value in values for _ in range(8)]] if turn % 3 else [[sum(values)] * 8]
        assert got.tolist() == expected * 2


def test_every_rank_counts_the_same_rounds_empty_ones_too(group: Group) -> None:
    before = [comm.rounds for comm in group.comms]
    assert len(set(before)) == 1
    group.together(lambda comm: [comm.all_reduce(torch.ones(rows, 4)) for rows in (1, 0, 2)])
    assert [comm.rounds for comm in group.comms] == [rounds + 3 for rounds in before]


def test_another_thread_waits_for_a_round(group: Group) -> None:
    comm = group.comms[1]
    comm.await_round(comm.rounds, 0.0)
    with pytest.raises(RankLost, match=r"rank 1 is lost: 1 rounds behind for 0\.1 s"):
        comm.await_round(comm.rounds + 1, 0.1)
    passed = threading.Event()
    number = comm.rounds + 2

    def wait() -> None:
        comm.await_round(number, 20.0)
        passed.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    group.together(lambda comm: comm.all_reduce(torch.ones(1, 4)))
    assert not passed.wait(0.1)
    group.together(lambda comm: comm.all_reduce(torch.ones(1, 4)))
    assert passed.wait(5.0)
    waiter.join(5.0)


def test_two_groups_live_in_one_process(group: Group) -> None:
    other = Group(2, timeout_s=20.0)
    for _ in range(3):
        assert other.together(lambda comm: comm.all_reduce(torch.ones(1)).item()) == [2.0, 2.0]
        ranks = len(group.comms)
        assert group.together(lambda comm: comm.all_reduce(torch.ones(1)).item()) == [float(ranks)] * ranks
    other.close()


def test_nothing_listens_beyond_loopback(group: Group) -> None:
    listening = [one for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert len(listening) > len(group.comms)  # each rank's and the meeting point's
    assert {one.laddr.ip for one in listening} == {"127.0.0.1"}


def test_a_missing_rank_is_noticed_in_time(doomed: Group) -> None:
    started_s = time.monotonic()
    with pytest.raises(RankLost, match=r"a rank is lost: .*Timed out") as lost:
        doomed.comms[0].all_reduce(torch.ones(1, 8))
    assert lost.value.rank is None
    assert 0.4 <= time.monotonic() - started_s < 3.0


def test_a_closed_connection_is_noticed_at_once(doomed: Group) -> None:
    doomed.comms[1].close()
    started_s = time.monotonic()
    with pytest.raises(RankLost, match="a rank is lost"):
        doomed.comms[0].all_reduce(torch.ones(1, 8))
    assert time.monotonic() - started_s < 0.4


def test_whoever_watches_the_processes_names_the_rank() -> None:
    deaths: list[RankLost] = []

    def check() -> None:
        if deaths:
            raise deaths[0]

    group = Group(2, timeout_s=5.0, check_peers=check)
    later = threading.Timer(0.1, deaths.append, (RankLost(1, "its process ended"),))
    group.comms[1].close()
    later.start()
    with pytest.raises(RankLost, match="rank 1 is lost: its process ended"):
        group.comms[0].all_reduce(torch.ones(1, 8))
    later.join(5.0)
    group.close()


def test_a_rank_that_never_connects_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "CONNECT_TIMEOUT_S", 0.5)
    comm = Collective(rank=0, ranks=2, device=CPU)
    port = comm.listen()
    started_s = time.monotonic()
    with pytest.raises(RankLost, match="a rank is lost"):
        comm.connect(port)
    assert time.monotonic() - started_s < 10.0
    comm.close()


def test_a_meeting_point_that_is_gone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "CONNECT_TIMEOUT_S", 0.5)
    with pytest.raises(RankLost, match="a rank is lost"):
        Collective(rank=1, ranks=2, device=CPU).connect(1)


def test_a_device_is_waited_for_but_not_forever() -> None:
    """What a GPU's event is asked, asked of a clock."""
    comm = Collective(rank=0, ranks=2, device=CPU, timeout_s=0.2)
    ready_s = time.monotonic() + 0.05
    comm.await_done(lambda: time.monotonic() > ready_s)
    assert time.monotonic() > ready_s
    with pytest.raises(RankLost, match=r"a rank is lost: the step is not done after 0\.2 s"):
        comm.await_done(lambda: False)


def test_a_death_ends_the_wait_for_a_device() -> None:
    def check() -> None:
        raise RankLost(1, "its process ended")

    comm = Collective(rank=0, ranks=2, device=CPU, timeout_s=30.0, check_peers=check)
    with pytest.raises(RankLost, match="rank 1 is lost: its process ended"):
        comm.await_done(lambda: False)
