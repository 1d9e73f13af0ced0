"""How long the ranks of one machine take to add up a step's tensor: shared memory against gloo, in the same processes.

    python -m bench.all_reduce

Both take turns in short blocks, so that a noisy machine disturbs them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bench import report
from engine.shared_reduce import SharedReduce, create_shared, map_shared, shared_bytes

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = 576  # of SmolLM2-135M
ROWS = (1, 8, 64, 512)
BLOCKS = 10
WARM_UP = 20  # rounds of a block that do not count
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Figure:
    """Microseconds of one all-reduce of [rows, hidden] float32 values, as rank 0 saw them."""

    kind: str  # "shared" or "gloo"
    ranks: int
    rows: int
    hidden: int
    p50_us: float
    p95_us: float


def measure(*, ranks: int = 2, rows: Sequence[int] = ROWS, hidden: int = HIDDEN, rounds: int = 1000) -> list[Figure]:
    """``rounds`` of each kind and size, one thread a rank. Starts ``ranks`` processes and waits for them."""
    descriptor = create_shared(shared_bytes(ranks))
    with tempfile.TemporaryDirectory(prefix="all-reduce-") as folder:
        sizes = ",".join(map(str, rows))
        common = [str(ranks), str(descriptor), f"{folder}/gloo", sizes, str(hidden), str(rounds)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.all_reduce", "--rank", str(rank), *common],
                cwd=ROOT, pass_fds=(descriptor,), stdout=subprocess.PIPE, text=True,
                env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            )
            for rank in range(ranks)
        ]  # fmt: skip
        os.close(descriptor)
        try:
            outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError("a rank of the measurement failed; its error is above")
    return [Figure(**figure) for figure in json.loads(outputs[0])]


def _rank(shared: SharedReduce, gloo: str, rows: Sequence[int], hidden: int, rounds: int) -> None:
    """Measures as one of the ranks; rank 0 prints the figures."""
    torch.set_num_threads(1)
    rank, ranks = shared.rank, shared.ranks
    dist.init_process_group("gloo", init_method=f"file://{gloo}", rank=rank, world_size=ranks)
    kinds: dict[str, Callable[[Tensor], object]] = {"shared": shared.all_reduce, "gloo": dist.all_reduce}
    figures = []
    for count in rows:
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(BLOCKS):
            for kind, act in kinds.items():
                times[kind] += _block(act, torch.ones(count, hidden), rounds // BLOCKS)
        figures += [_figure(kind, ranks, count, hidden, taken) for kind, taken in times.items()]
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        print(json.dumps([asdict(figure) for figure in figures]))


def _block(act: Callable[[Tensor], object], x: Tensor, rounds: int) -> list[float]:
    taken = []
    for _ in range(WARM_UP + rounds):
        x.fill_(1.0)  # sums of sums would overflow
        started_s = time.perf_counter()
        act(x)
        taken.append(time.perf_counter() - started_s)
    return taken[WARM_UP:]


def _figure(kind: str, ranks: int, rows: int, hidden: int, taken: list[float]) -> Figure:
    ordered = sorted(taken)
    p50, p95 = (round(1e6 * ordered[int(share * (len(ordered) - 1))], 1) for share in (0.5, 0.95))
    return Figure(kind, ranks, rows, hidden, p50, p95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--rank", nargs=7, help=argparse.SUPPRESS)  # how this file starts itself, once per rank
    options = parser.parse_args()
    if options.rank:
        rank, ranks, descriptor, gloo, sizes, hidden, rounds = options.rank
        shared = SharedReduce(map_shared(int(descriptor)), rank=int(rank), ranks=int(ranks))
        _rank(shared, gloo, [int(size) for size in sizes.split(",")], int(hidden), int(rounds))
        return
    print("kind    ranks  rows  p50 us  p95 us")
    figures = measure(ranks=options.ranks, rounds=options.rounds)
    for one in figures:
        print(f"{one.kind:6}  {one.ranks:5}  {one.rows:4}  {one.p50_us:6.0f}  {one.p95_us:6.0f}")
    report.save("all-reduce", [asdict(one) for one in figures])


if __name__ == "__main__":
    main()
