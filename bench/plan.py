"""What the planner claims, measured: `python -m bench.plan speed|fixture|search|large|seventy|calibration|reality`.

Results go to ``bench/results/plan-*`` with the date, the command and the machine. The data of ``../shared/data`` is
needed for all but ``reality``.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from baton import config as configs
from bench import plan_fixture, plan_reality
from bench.plan_fixture import DATA, FITS
from bench.report import FOLDER, save
from placement import plan as plans
from placement import report, traces
from placement.cluster import Cluster, Pool
from placement.composition import LINE, Composition, Space, Way
from placement.fits import OptFit
from placement.goodput import Trial, improve, rate_at
from placement.hardware import Hardware
from placement.linear import LinearCost
from placement.model_shape import ModelShape
from placement.outcome import Slo
from placement.profile import Profile
from placement.replica import EngineLimits
from placement.search import Found, enough, exhaustive, search, with_help
from placement.simulator import simulate
from placement.spaces import gpu_space
from placement.synthetic import ObservedLengths, Poisson, draw
from placement.tables import Tables, convert
from placement.workload import Workload

CONVERSATIONS = Slo(0.5, 0.03)  # of the 70B-shaped model
PROCESSES = 2

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def fixture(seeds: int = 5) -> None:
    """simdistserve's figures under its restrictions, then ours without them."""
    save("plan-fixture", plan_fixture.compare(seeds))


@app.command()
def calibration() -> None:
    """5-fold held-out error of the H200 kernel tables."""
    rows = {name: {"median": held.median, "p95": held.p95} for name, held in convert(DATA / "h200").held_out()}
    for name, row in rows.items():
        print(f"{name}: median {row['median']:.1%}, p95 {row['p95']:.1%}")
    save("plan-calibration", rows)


@app.command()
def reality(
    profile: Annotated[Path, typer.Option(help="From `baton profile` on the machine that was measured.")],
    measured: Annotated[list[Path], typer.Option(help="Results of bench.goodput, one file per setting.")],
    config: Annotated[Path | None, typer.Option(help="The service's configuration; defaults without it.")] = None,
) -> None:
    """Predicted against measured: every run's requests go through the simulator at the times they were due."""
    known, settings = Profile.load(profile), configs.load(config)
    rows = list(plan_reality.compare(known, [json.loads(path.read_text()) for path in measured], settings))
    print("\n".join(plan_reality.lines(rows)))
    save("plan-reality", {"profiled": known.date, "rows": rows})
    plan_reality.draw(rows, FOLDER / "plan-reality.png")


@app.command()
def speed(requests: int = 5000) -> None:
    """Simulated requests per second of CPU time on one core, with and without fast-forwarding."""
    trace = traces.load(DATA / "traces" / "azure_2023_conv.csv").first(requests)
    cost = OptFit.load(FITS["distserve"], tp=2)
    limits = EngineLimits(step_tokens=2048)
    cases = {
        "1 prefill + 1 decode, 5/s": (Cluster(Pool(cost, 1, limits), Pool(cost, 1, limits)), 5.0),
        "6 prefill + 6 decode, 30/s": (Cluster(Pool(cost, 6, limits), Pool(cost, 6, limits)), 30.0),
        "2 co-located, 6/s": (Cluster(Pool(cost, 2, limits)), 6.0),
    }
    rows = {}
    for name, (bare, rate) in cases.items():
        cluster = replace(bare, local_prefill=True, admission=LINE)
        arrivals = trace.at_rate(rate).arrivals
        seconds = {fast: min(_timed(partial(simulate, cluster, arrivals, fast=fast)) for _ in range(3 if fast else 1))
                   for fast in (True, False)}  # fmt: skip
        rows[name] = {"fast": requests / seconds[True], "stepwise": requests / seconds[False]}
        print(name, {key: round(value) for key, value in rows[name].items()})
    save("plan-speed", {"unit": "simulated requests per second of CPU time", "requests": requests, "cases": rows})


@app.command("search")
def search_command(most: int = 8) -> None:
    """Small instances against everything there is."""
    instances = [(gpus, slo) for gpus in range(2, most + 1) for slo in (Slo(0.25, 0.02), Slo(0.6, 0.05))]
    with ProcessPoolExecutor(PROCESSES) as executor:
        rows = list(executor.map(_small, instances))
    for row in rows:
        print(row)
    save("plan-search", {"small": rows})


def _small(instance: tuple[int, Slo]) -> dict[str, Any]:
    """One instance searched and tried out; nodes of four accelerators, handoffs within them ten times as fast."""
    gpus, slo = instance
    lengths = ObservedLengths(((400, 40), (900, 20), (100, 60)))
    trial = Trial(draw("drawn", 200, 1.0, Poisson(), lengths, seed=3), slo, 200)
    near, far = ((_toy(1, 2e-4, 2e-6, token_s), _toy(2, 0.8e-4, 1.2e-6, token_s)) for token_s in (1e-6, 1e-5))
    space = Space(far, far, far, near, node_gpus=4)
    found, best = search(space, gpus, trial), exhaustive(space, gpus, trial)
    return {
        "gpus": gpus, "ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "tried": found.tried,
        "search": found.best[0].goodput, "exhaustive": best.goodput if best else 0.0,
        "found": found.best[0].composition.title, "optimum": best.composition.title if best else "",
    }  # fmt: skip


@app.command()
def large(gpus: int = 64, pipeline: bool = False) -> None:
    """Seconds of a search for the 70B-shaped model: wall, and CPU of all processes, half of which the wall cannot beat.

    From the converted kernel tables on, as ``baton plan`` has them: making the cost models is part of it.
    """
    tables = convert(DATA / "h200")
    wall_s, cpu_s = time.perf_counter(), _cpu_s()
    space, trace = _h200("llama-3.1-70b", tables, pipeline=pipeline), _conversations()
    requests = enough(space, gpus, trace, CONVERSATIONS)
    with ProcessPoolExecutor(PROCESSES) as executor:
        found = search(space, gpus, Trial(trace, CONVERSATIONS, requests), executor=executor, progress=print)
    row = {
        "gpus": gpus, "requests a trial": requests, "processes": PROCESSES,
        "wall_s": time.perf_counter() - wall_s, "cpu_s": _cpu_s() - cpu_s, "tried": found.tried,
        "best": {scored.composition.title: scored.goodput for scored in found.best},
    }  # fmt: skip
    print(row)
    save("plan-large-pipeline" if pipeline else "plan-large", row)


def _toy(tp: int, prefill_token_s: float, context_token_s: float, transfer_token_s: float) -> Way:
    cost = LinearCost(
        0.01, prefill_token_s, 1e-4, context_token_s, transfer_token_s, capacity_tokens=1 << 16, gpus=tp
    )  # fmt: skip
    return Way(tp, 1, EngineLimits(max_running=64, mixed_tokens=2048), cost)


@app.command()
def seventy(gpus: int = 32, requests: int = 4000, pipeline: bool = False) -> None:
    """A 70B-shaped model on 32 H200 for the Azure conversations: the plan against co-location and equal halves."""
    space = _h200("llama-3.1-70b", convert(DATA / "h200"), pipeline=pipeline)
    trial = Trial(_conversations(), CONVERSATIONS, requests)
    wall_s, cpu_s = time.perf_counter(), _cpu_s()
    with ProcessPoolExecutor(PROCESSES) as executor:
        found = search(space, gpus, trial, executor=executor, progress=print)
        halves = _halves(found, gpus)
        rates = executor.map(partial(_goodput, trial), halves)
        goodput, (half, _) = max(zip(rates, halves, strict=True), key=lambda pair: pair[0])
        labels = {"model": "llama-3.1-70b", "hardware": "h200-sxm"}
        made = plans.make(with_help(found.best[0], trial), found, trial, labels, executor=executor)
    even = plans.Alternative("equal halves: " + half.title, gpus, goodput)
    made = replace(made, alternatives=(*made.alternatives, even))
    print("\n".join(made.story()))
    name = "plan-70b-pipeline" if pipeline else "plan-70b"
    report.draw_plan(made, found, FOLDER / f"{name}.png")
    (FOLDER / f"{name}.yaml").write_text(made.to_yaml(), encoding="utf-8")
    seconds = {"wall_s": time.perf_counter() - wall_s, "cpu_s": _cpu_s() - cpu_s, "processes": PROCESSES}
    save(name, {**seconds, "story": list(made.story()), "curve": [asdict(point) for point in made.curve]})


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
    return rate_at(improve(half[0].cluster, trial, guess=half[1]))


def _h200(model: str, tables: Tables, *, pipeline: bool) -> Space:
    shape, gap_s = ModelShape.load(model), CONVERSATIONS.tpot_s
    return gpu_space(shape, Hardware.load("h200-sxm"), tables, longest=8192, gap_s=gap_s, pipeline=pipeline)


def _conversations() -> Workload:
    return traces.load(DATA / "traces" / "azure_2023_conv.csv").fitting(8192)


def _timed(work: Callable[[], object]) -> float:
    """CPU seconds of this process: the machine has other users."""
    started = time.process_time()
    work()
    return time.process_time() - started


def _cpu_s() -> float:
    """CPU seconds of this process and of those of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    app()
