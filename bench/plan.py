"""What the planner claims, measured: `python -m bench.plan speed|fixture|search|seventy|calibration|reality`.

Results go to ``bench/results/plan-*.{json,png}`` with the machine they came from. The data of ``../shared/data`` is
needed for all but ``reality``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from baton import config as configs
from bench import machine
from placement import plan as plans
from placement import report, traces
from placement.cost import StepShape
from placement.fits import OptFit
from placement.goodput import Trial, climb, decode_alone, prefill_alone, rate_at
from placement.hardware import Hardware
from placement.linear import LinearCost
from placement.model_shape import ModelShape
from placement.outcome import Outcome, Slo
from placement.profile import Profile, ProfiledReplica
from placement.replica import EngineLimits
from placement.search import Composition, Found, Space, Way, exhaustive, improve, search
from placement.simulator import Cluster, Pool, simulate
from placement.spaces import gpu_space
from placement.synthetic import ObservedLengths, Poisson, draw
from placement.tables import convert
from placement.workload import Arrival, Workload

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "bench" / "results"
SLO = Slo(0.25, 0.1)
FITS = {engine: DATA / "distserve" / f"profiler-a100-80g.{engine}.json" for engine in ("distserve", "vllm")}
FIGURES = {
    "prefill TP1": 3.63, "prefill TP2": 4.31, "prefill TP4": 5.31,
    "decode TP1": 4.06, "decode TP2": 3.75, "decode TP4": 5.06, "decode PP2": 5.00,
    "split, best": 2.11, "co-located TP1": 1.02, "co-located TP2": 1.56,
}  # fmt: skip
UNLIMITED = EngineLimits(step_tokens=1 << 30, max_running=1 << 20, max_waiting=1 << 20)

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


# ---- the DistServe fixture


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

    def step_s(self, step: StepShape) -> float:
        return self.fit.step_s(StepShape(step.chunks, () if step.chunks else step.contexts))

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

    def run(self, cluster: Cluster, rate: float, *, give_up: bool = False) -> Outcome:
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
        rate_at(improve(Composition(d, 1, p, 1), trial, guess=2.0)) / (p.gpus + d.gpus) for p, d in pairs
    )
    for tp in (1, 2):
        cluster = Cluster(way(tp, 1, "vllm").pool(1))
        figures[f"co-located TP{tp}"] = rate_at(climb(partial(trial.meets, cluster))) / tp
    return figures


def honest(requests: int = 5000) -> dict[str, Any]:
    """Joint attainment, memory limits, transfers as the fits' cost model has them, free replication on 4 GPUs."""
    workload = draw("azure-short", requests, 1.0, Poisson(), ObservedLengths(tuple(short_pairs())), seed=1)
    trial = Trial(workload, SLO, requests)
    limits = EngineLimits(step_tokens=2048, max_running=512)
    ways = tuple(
        Way(tp, pp, limits, OptFit.load(FITS["distserve"], tp=tp, pp=pp))
        for tp, pp in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2))
    )
    with ProcessPoolExecutor() as executor:
        found = search(Space(ways, ways, ways), 4, trial, mapper=executor.map)
    return {
        "requests": requests,
        "best": {s.composition.title: s.per_gpu for s in found.best},
        "prefill alone": {str(w): r / w.gpus for w, r in found.prefill_alone},
        "decode alone": {str(w): r / w.gpus for w, r in found.decode_alone},
    }


@app.command()
def fixture(seeds: int = 5) -> None:
    """simdistserve's figures under its restrictions, then ours without them."""
    with ProcessPoolExecutor() as executor:
        runs = {n: list(executor.map(partial(restricted, n), range(k))) for n, k in ((300, seeds), (1000, 3))}
    rows = {}
    for name, figure in FIGURES.items():
        at = {n: [run[name] for run in results] for n, results in runs.items()}
        rows[name] = {
            "figure": figure,
            **{
                f"N={n}": {
                    "mean": statistics.mean(v),
                    "least": min(v),
                    "most": max(v),
                    "of figure": statistics.mean(v) / figure,
                }
                for n, v in at.items()
            },
        }
        print(
            name, figure, {n: (round(min(v), 2), round(statistics.mean(v), 2), round(max(v), 2)) for n, v in at.items()}
        )
    _save("fixture", {"restricted": rows, "joint": honest()})


# ---- speed


@app.command()
def speed(requests: int = 5000) -> None:
    """Simulated requests per second of wall time on one core, with and without fast-forwarding."""
    trace = traces.load(DATA / "traces" / "azure_2023_conv.csv").first(requests)
    cost = OptFit.load(FITS["distserve"], tp=2)
    limits = EngineLimits(step_tokens=2048)
    cases = {
        "1 prefill + 1 decode, 5/s": (Cluster(Pool(cost, 1, limits), Pool(cost, 1, limits)), 5.0),
        "6 prefill + 6 decode, 30/s": (Cluster(Pool(cost, 6, limits), Pool(cost, 6, limits)), 30.0),
        "2 co-located, 6/s": (Cluster(Pool(cost, 2, limits)), 6.0),
    }
    rows = {}
    for name, (cluster, rate) in cases.items():
        arrivals = trace.at_rate(rate).arrivals
        seconds = {fast: min(_timed(partial(simulate, cluster, arrivals, fast=fast)) for _ in range(3 if fast else 1))
                   for fast in (True, False)}  # fmt: skip
        rows[name] = {"fast": requests / seconds[True], "stepwise": requests / seconds[False]}
        print(name, {key: round(value) for key, value in rows[name].items()})
    _save("speed", {"unit": "simulated requests per second of CPU time", "requests": requests, "cases": rows})


# ---- search


@app.command("search")
def search_command(most: int = 8, large: int = 64) -> None:
    """Small instances against everything there is, and a large one against the clock."""
    rows, times = [], {}
    lengths = ObservedLengths(((400, 40), (900, 20), (100, 60)))
    for gpus in range(2, most + 1):
        for slo in (Slo(0.25, 0.02), Slo(0.6, 0.05)):
            trial = Trial(draw("drawn", 200, 1.0, Poisson(), lengths, seed=3), slo, 200)
            space = Space(*((_toy(1, 2e-4, 2e-6), _toy(2, 0.8e-4, 1.2e-6)),) * 3)
            found, best = search(space, gpus, trial), exhaustive(space, gpus, trial)
            rows.append({
                "gpus": gpus, "ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "search": found.best[0].goodput,
                "exhaustive": best.goodput if best else 0.0, "tried": found.tried,
            })  # fmt: skip
            print(rows[-1])
    space, trace = _h200("llama-3.1-70b"), traces.load(DATA / "traces" / "azure_2023_conv.csv").fitting(8192)
    started = time.perf_counter()
    with ProcessPoolExecutor(2) as executor:
        found = search(space, large, Trial(trace, Slo(0.5, 0.03), 5000), mapper=executor.map, progress=print)
    times[f"{large} GPUs"] = time.perf_counter() - started
    print(times, found.best[0].composition.title)
    _save("search", {"small": rows, "seconds": times, "tried": found.tried, "best": found.best[0].composition.title})


def _toy(tp: int, prefill_token_s: float, context_token_s: float) -> Way:
    cost = LinearCost(0.01, prefill_token_s, 1e-4, context_token_s, 1e-5, capacity_tokens=1 << 16, gpus=tp)
    return Way(tp, 1, EngineLimits(max_running=64), cost)


def _h200(model: str, longest: int = 8192) -> Space:
    return gpu_space(ModelShape.load(model), Hardware.load("h200-sxm"), convert(DATA / "h200"), longest=longest)


@app.command()
def seventy(gpus: int = 32, requests: int = 4000) -> None:
    """A 70B-shaped model on 32 H200 for the Azure conversations: the plan against co-location and equal halves."""
    space, trace = _h200("llama-3.1-70b"), traces.load(DATA / "traces" / "azure_2023_conv.csv").fitting(8192)
    trial = Trial(trace, Slo(0.5, 0.03), requests)
    with ProcessPoolExecutor() as executor:
        found = search(space, gpus, trial, mapper=executor.map, progress=print)
        halves = _halves(found, gpus)
        rates = executor.map(partial(_goodput, trial), halves)
        goodput, (half, _) = max(zip(rates, halves, strict=True), key=lambda pair: pair[0])
        labels = {"model": "llama-3.1-70b", "hardware": "h200-sxm"}
        made = plans.make(found.best[0], found, trial, labels, mapper=executor.map)
    even = plans.Alternative("equal halves: " + half.title, gpus, goodput)
    made = replace(made, alternatives=(*made.alternatives, even))
    print("\n".join(made.story()))
    report.draw_plan(made, found, RESULTS / "plan-70b.png")
    (RESULTS / "plan-70b.yaml").write_text(made.to_yaml(), encoding="utf-8")
    _save("70b", {"story": list(made.story()), "curve": [asdict(point) for point in made.curve]})


def _halves(found: Found, gpus: int) -> list[tuple[Composition, float]]:
    """Half of the accelerators for either phase: the three that promise most among all pairs of degrees."""
    half = gpus // 2
    promised = [
        (Composition(d, half // d.gpus, p, half // p.gpus), half * min(p_rate / p.gpus, d_rate / d.gpus))
        for p, p_rate in found.prefill_alone
        for d, d_rate in found.decode_alone
        if half % p.gpus == 0 and half % d.gpus == 0
    ]
    return sorted(promised, key=lambda pair: -pair[1])[:3]


def _goodput(trial: Trial, half: tuple[Composition, float]) -> float:
    return rate_at(improve(half[0], trial, guess=half[1]))


# ---- calibration and reality


@app.command()
def calibration() -> None:
    """5-fold held-out error of the H200 kernel tables."""
    rows = {name: {"median": held.median, "p95": held.p95} for name, held in convert(DATA / "h200").held_out()}
    for name, row in rows.items():
        print(f"{name}: median {row['median']:.1%}, p95 {row['p95']:.1%}")
    _save("calibration", rows)


@app.command()
def reality(
    profile: Annotated[Path, typer.Option(help="From `baton profile` on the machine that was measured.")],
    measured: Annotated[list[Path], typer.Option(help="Results of bench.goodput, one file per setting.")],
    config: Annotated[Path | None, typer.Option(help="The service's configuration; defaults without it.")] = None,
) -> None:
    """Predicted against measured: every run's requests go through the simulator at the times they were due."""
    known, settings = Profile.load(profile), configs.load(config)
    rows = [row for path in measured for row in _compare(known, json.loads(path.read_text()), settings)]
    _save("reality", {"profile": str(profile), "rows": rows})


def _compare(profile: Profile, document: dict[str, Any], settings: configs.Config) -> Iterator[dict[str, Any]]:
    """One row per measured rate, and one for the goodput where several rates were tried."""
    server, options = document["server"], document["options"]
    pools = {}
    for role, pool in (("prefill", settings.prefill), ("decode", settings.decode)):
        transport = server["transport"] or settings.handoff.transport
        cost = ProfiledReplica(profile, codec=server["codec"], transport=transport, kv_tokens=pool.kv_tokens)
        limits = EngineLimits(pool.page_tokens, pool.step_tokens, pool.max_running, pool.max_waiting)
        pools[role] = Pool(cost, server["pools"].get(role, 0), limits)
    cluster = Cluster(pools["decode"], pools["prefill"] if pools["prefill"].replicas else None)
    slo = Slo(options["ttft_ms"] / 1e3, options["tpot_ms"] / 1e3)
    predicted_curve, measured_curve = [], []
    for run in document["runs"]:
        requests = sorted((r["due_s"], r["prompt_tokens"], r["output_tokens"]) for r in run["records"])
        outcome = simulate(cluster, [Arrival(*request) for request in requests])
        row: dict[str, Any] = {"pools": server["pools"], "rate": run["rate_per_s"]}
        for share in (50, 90):
            for name, seconds in zip(("ttft", "tpot"), outcome.percentiles(share / 100), strict=True):
                true_ms = run["summary"][f"{name}_ms"][f"p{share}"]
                row[f"{name}_p{share}"] = {"measured_ms": true_ms, "predicted_ms": 1e3 * seconds,
                                           "error": 1e3 * seconds / true_ms - 1}  # fmt: skip
        predicted_curve.append((run["rate_per_s"], outcome.attainment(slo).joint))
        measured_curve.append((run["rate_per_s"], run["summary"]["attainment"]))
        errors = {name: f"{row[name]['error']:+.1%}" for name in ("ttft_p50", "ttft_p90", "tpot_p50", "tpot_p90")}
        print(row["pools"], row["rate"], errors)
        yield row
    if len(document["runs"]) > 1:
        true, guess = _crossing(measured_curve), _crossing(predicted_curve)
        error = guess / true - 1 if guess and true else None
        print(server["pools"], "goodput", true, guess, error)
        yield {"pools": server["pools"], "goodput": {"measured": true, "predicted": guess, "error": error}}


def _crossing(curve: list[tuple[float, float]], share: float = 0.9) -> float | None:
    """The rate at which attainment falls through ``share``, linear between the rates tried; None when it never does."""
    ordered = sorted(curve)
    for (rate, above), (next_rate, below) in pairwise(ordered):
        if above >= share > below:
            return rate + (next_rate - rate) * (above - share) / (above - below)
    return None


# ---- results


def _timed(work: Callable[[], object]) -> float:
    """CPU seconds of this process: the machine has other users."""
    started = time.process_time()
    work()
    return time.process_time() - started


def _save(name: str, result: Any) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"plan-{name}.json"
    tree = {"machine": machine.describe(), "result": result}
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    app()
