"""DistServe's published simulator and ours side by side: its figures under its restrictions, then ours without them.

The figures are those of the original simdistserve with the fits of ``../shared/data/distserve``: OPT-13B on A100 80 GB,
lengths of the Azure conversations, Poisson arrivals, TTFT 250 ms, TPOT 100 ms, 90 % of each, four accelerators.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from placement import traces
from placement.cluster import Cluster
from placement.composition import Composition, Space, Way
from placement.fits import OptFit
from placement.goodput import Trial, climb, decode_alone, improve, prefill_alone, rate_at
from placement.outcome import Outcome, Slo
from placement.replica import EngineLimits
from placement.search import search
from placement.simulator import simulate
from placement.synthetic import ObservedLengths, Poisson, draw
from placement.workload import Arrival, Workload

DATA = Path(__file__).parents[2] / "shared" / "data"
SLO = Slo(0.25, 0.1)
FITS = {engine: DATA / "distserve" / f"profiler-a100-80g.{engine}.json" for engine in ("distserve", "vllm")}
FIGURES = {
    "prefill TP1": 3.63, "prefill TP2": 4.31, "prefill TP4": 5.31,
    "decode TP1": 4.06, "decode TP2": 3.75, "decode TP4": 5.06, "decode PP2": 5.00,
    "split, best": 2.11, "co-located TP1": 1.02, "co-located TP2": 1.56,
}  # fmt: skip
UNLIMITED = EngineLimits(step_tokens=1 << 30, max_running=1 << 20, max_waiting=1 << 20, mixed_tokens=1 << 30)


@dataclass(frozen=True, slots=True)
class Unbounded:
    """A fit without limits of memory and without transfers, as in simdistserve.

    Its co-located workers compute waiting prompts first and decode in steps of their own. The real scheduler decodes
    along with prefill; here those decodes cost nothing, so that a prompt waits as long as there.
    """

    fit: OptFit

    @property
    def gpus(self) -> int:
        return self.fit.gpus

    def sum_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_sum: int) -> float:
        return self.fit.sum_s(chunks, *((0, 0) if chunks else (batch, context_sum)))

    def decode_step_s(self, batch: int, context_sum: int) -> float:
        return self.fit.decode_step_s(batch, context_sum)

    def transfer_s(self, tokens: int) -> float:
        return 0.0

    def exposed_transfer_s(self, tokens: int) -> float:
        return 0.0

    def kv_tokens(self) -> int:
        return 2_000_000


@dataclass(frozen=True, slots=True)
class Separate(Trial):
    """simdistserve's criterion: each target met by its own 90 % of requests. Times are unit gaps over the rate."""

    def run(self, cluster: Cluster, rate: float, *, decide: bool = False) -> Outcome:
        return simulate(cluster, self.workload.in_time(1 / rate).arrivals)

    def shortened(self, guess: float) -> Trial:
        """As many requests as asked for, however short that is: what a few hundred requests show is the point."""
        return self

    def meets(self, cluster: Cluster, rate: float) -> bool:
        met = self.run(cluster, rate).attainment(self.slo)
        return min(met.ttft, met.tpot) >= self.slo.attainment


def short_pairs() -> list[tuple[int, int]]:
    trace = traces.load(DATA / "traces" / "azure_2023_conv.csv")
    pairs = ((a.prompt_tokens, a.output_tokens) for a in trace.arrivals)
    return [(p, o) for p, o in pairs if p + o <= 2048 and p > 1 and o > 1]


def original(requests: int, seed: int) -> Workload:
    """Lengths drawn without replacement and unit exponential gaps. simdistserve decodes every output token, so that
    with ours, whose first token is prefill's, an answer is one token longer.
    """
    pairs, rng = short_pairs(), np.random.RandomState(seed)
    chosen = [pairs[index] for index in rng.permutation(len(pairs))[:requests]]
    times = np.concatenate([[0.0], np.cumsum(np.random.RandomState(seed).gamma(1, 1, requests - 1))])
    return Workload("azure", tuple(Arrival(float(t), p, o + 1) for t, (p, o) in zip(times, chosen, strict=True)))


def way(tp: int, pp: int, engine: str = "distserve") -> Way:
    fit = OptFit.load(FITS[engine], tp=tp, pp=pp)
    return Way(tp, pp, UNLIMITED, Unbounded(fit))


def restricted(requests: int, seed: int) -> dict[str, float]:
    """simdistserve's figures with our simulator under its restrictions, requests per second and accelerator."""
    trial = Separate(original(requests, seed), SLO, requests)
    figures = {}
    for tp in (1, 2, 4):
        figures[f"prefill TP{tp}"] = rate_at(prefill_alone(way(tp, 1).pool(1), trial)) / tp
    for tp, pp in ((1, 1), (2, 1), (4, 1), (1, 2)):
        name = f"decode {f'PP{pp}' if pp > 1 else f'TP{tp}'}"
        figures[name] = min(16.0, rate_at(decode_alone(way(tp, pp).pool(1), trial)) / tp / pp)
    pairs = [(way(1, 1), way(1, 1)), (way(2, 1), way(2, 1)), (way(2, 1), way(1, 2)), (way(2, 1), way(1, 1))]
    figures["split, best"] = max(
        rate_at(improve(replace(Composition(d, 1, p, 1).cluster, paired=True), trial, guess=2.0)) / (p.gpus + d.gpus)
        for p, d in pairs
    )
    for tp in (1, 2):
        cluster = Cluster(way(tp, 1, "vllm").pool(1))
        figures[f"co-located TP{tp}"] = rate_at(climb(partial(trial.meets, cluster))) / tp
    return figures


def honest(requests: int = 5000) -> dict[str, Any]:
    """Joint attainment, memory limits, transfers as the fits' cost model has them, free replication on 4 GPUs."""
    workload = draw("azure-short", requests, 1.0, Poisson(), ObservedLengths(tuple(short_pairs())), seed=1)
    trial = Trial(workload, SLO, requests)
    limits = EngineLimits(step_tokens=2048, max_running=512, mixed_tokens=2048)
    ways = tuple(
        Way(tp, pp, limits, OptFit.load(FITS["distserve"], tp=tp, pp=pp))
        for tp, pp in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2))
    )
    with ProcessPoolExecutor() as executor:
        found = search(Space(ways, ways, ways), 4, trial, executor=executor)
    return {
        "requests": requests,
        "best": {s.composition.title: s.per_gpu for s in found.best},
        "prefill alone": {str(w): r / w.gpus for w, r in found.prefill_alone},
        "decode alone": {str(w): r / w.gpus for w, r in found.decode_alone},
    }


def compare(seeds: int) -> dict[str, Any]:
    """Both comparisons, printed as they come."""
    with ProcessPoolExecutor() as executor:
        runs = {n: list(executor.map(partial(restricted, n), range(k))) for n, k in ((300, seeds), (1000, 3))}
    rows = {name: _row(name, figure, runs) for name, figure in FIGURES.items()}
    return {"restricted": rows, "joint": honest()}


def _row(name: str, figure: float, runs: Mapping[int, Iterable[Mapping[str, float]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"figure": figure}
    for requests, results in runs.items():
        ours = [result[name] for result in results]
        mean = statistics.mean(ours)
        row[f"N={requests}"] = {"mean": mean, "least": min(ours), "most": max(ours), "of figure": mean / figure}
        print(f"{name}, {requests} requests: {figure}, ours {mean:.2f} [{min(ours):.2f}, {max(ours):.2f}]")
    return row
