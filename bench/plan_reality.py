"""Predicted against measured: the requests of ``bench.goodput``, warm-up too, go through the simulator when due.

What predicts is the profile, at the machine's speed during the run (``placement.pulse``), and what the service took of
the cores before any load: at rest, and for a request at a time (``bench.errands``). Runs of one setting and rate, with
other seeds, are taken together. A run on a machine that others used is no measurement of the service: it is named
disturbed and not compared.
"""

from __future__ import annotations

import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from baton import config as configs
from baton.errors import ConfigError
from bench import goodput
from bench.errands import Errands
from bench.stats import percentile
from placement.cluster import Cluster, Pool
from placement.host import SharedMachine
from placement.outcome import End, Slo
from placement.profile import Profile, ProfiledReplica
from placement.replica import EngineLimits
from placement.simulator import simulate
from placement.workload import Arrival

MEASURES = ("ttft", "tpot")
SHARES = (50, 90)
FIGURES = tuple(f"{name}_p{share}" for share in SHARES for name in MEASURES)
GOAL = 0.15  # of every error
OTHERS_CORES = 0.1  # taken by neither the service nor the client: above it a run is disturbed


@dataclass(frozen=True, slots=True)
class Seen:
    """What one client saw: seconds, and whether it met the objective."""

    ttft: float
    tpot: float
    met: bool


def compare(
    profile: Profile, documents: Sequence[Mapping[str, Any]], settings: configs.Config
) -> Iterator[dict[str, Any]]:
    """One row per setting and rate, one for each disturbed run, and per setting one for the goodput.

    Raises :class:`ConfigError` for a document of another machine's service or of an older form.
    """
    documents = [{**one, "errands": errands} for one, errands in zip(documents, _errands(documents), strict=True)]
    for setting, repeats in _by_setting(documents).items():
        curves: dict[str, list[Point]] = {"measured": [], "predicted": []}
        for rate, runs in _by_rate(repeats).items():
            quiet = [(document, run) for document, run in runs if not disturbance(run)]
            for _, run in runs:
                if why := disturbance(run):
                    yield {**setting.row, "rate": rate, "disturbed": why}
            if not quiet:
                continue
            row = _row(profile, quiet, settings)
            for name, curve in curves.items():
                curve.append((rate, row["attainment"][name], row["requests"]))
            yield {**setting.row, "rate": rate, **row}
        true, guess = (crossing(falling(curves[name])) for name in ("measured", "predicted"))
        error = guess / true - 1 if guess and true else None
        yield {**setting.row, "goodput": {"measured": true, "predicted": guess, "error": error}}


def _errands(documents: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """What requests cost beside their steps is one thing per pools, whatever they ask: the median of its readings.

    Those taken while others used the machine do not count, unless there are no others.
    """
    readings: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for document in sorted(documents, key=lambda one: (one["at_rest"]["others"] or 0.0) > OTHERS_CORES):
        pools, quiet = str(document["server"]["pools"]), (document["at_rest"]["others"] or 0.0) <= OTHERS_CORES
        if quiet or not readings[pools]:
            readings[pools].append(document["errands"])
    medians = {
        pools: {name: statistics.median(one[name] for one in some) for name in some[0]}
        for pools, some in readings.items()
    }
    return [medians[str(document["server"]["pools"])] for document in documents]


def disturbance(run: Mapping[str, Any]) -> str:
    """Why this run says nothing of the service alone; empty when it does."""
    cores = run["cores"]
    if cores.get("others") is None or run.get("pulse_s") is None:
        raise ConfigError("the run does not say who used the machine: measure again", field="measured")
    if cores["others"] > OTHERS_CORES:
        return f"others took {cores['others']:.2f} cores, above {OTHERS_CORES:g}"
    return ""


@dataclass(frozen=True, slots=True)
class _Setting:
    """Pools, lengths and objectives."""

    pools: tuple[tuple[str, int], ...]
    prompt: str
    output: str
    ttft_ms: float
    tpot_ms: float

    @property
    def row(self) -> dict[str, Any]:
        return {"pools": dict(self.pools), "prompt": self.prompt, "output": self.output}


Point = tuple[float, float, int]  # a rate, the share that met the objective, and of how many requests
Run = tuple[Mapping[str, Any], Mapping[str, Any]]  # the document, and one of its runs


def _by_setting(documents: Sequence[Mapping[str, Any]]) -> dict[_Setting, list[Mapping[str, Any]]]:
    found: dict[_Setting, list[Mapping[str, Any]]] = defaultdict(list)
    for document in documents:
        options = document["options"]
        pools = tuple(sorted(document["server"]["pools"].items()))
        lengths = [", ".join(f"{value}" for value in options[name].values()) for name in ("prompt", "output")]
        found[_Setting(pools, lengths[0], lengths[1], options["ttft_ms"], options["tpot_ms"])].append(document)
    return found


def _by_rate(documents: Sequence[Mapping[str, Any]]) -> dict[float, list[Run]]:
    found: dict[float, list[Run]] = defaultdict(list)
    for document in documents:
        for run in document["runs"]:
            found[run["rate_per_s"]].append((document, run))
    return dict(sorted(found.items()))


def _row(profile: Profile, runs: Sequence[Run], settings: configs.Config) -> dict[str, Any]:
    """``as_profiled``: the error without the correction for the machine's speed during the runs."""
    measured = [one for document, run in runs for one in _measured(document, run)]
    predicted = [one for each in runs for one in _predicted(profile.at(each[1]["pulse_s"]), each, settings)]
    steady = [(document, {**run, "course": ()}) for document, run in runs]
    uncorrected = [one for each in steady for one in _predicted(profile, each, settings)]
    row: dict[str, Any] = {
        "requests": len(measured),
        "pulse": [run["pulse_s"] / profile.pulse_s for _, run in runs],
        "others_cores": [run["cores"]["others"] for _, run in runs],
        "stolen_cores": [run["cores"]["stolen"] for _, run in runs],
    }
    for name in MEASURES:
        for share in SHARES:
            true_s, guess_s, plain_s = (
                percentile([getattr(one, name) for one in some], share) for some in (measured, predicted, uncorrected)
            )
            row[f"{name}_p{share}"] = {
                "measured_ms": 1e3 * true_s,
                "predicted_ms": 1e3 * guess_s,
                "error": guess_s / true_s - 1,
                "as_profiled": plain_s / true_s - 1,
            }
    row["attainment"] = {"measured": _met(measured), "predicted": _met(predicted)}
    return row


def _measured(document: Mapping[str, Any], run: Mapping[str, Any]) -> list[Seen]:
    """Of requests that got all their tokens; the others count as missed."""
    seen = []
    for record in run["records"]:
        times_s = record["token_times_s"]
        whole = record["status"] == "OK" and len(times_s) == record["output_tokens"]
        ttft_s = times_s[0] - record["due_s"] if whole else float("inf")
        tpot_s = (times_s[-1] - times_s[0]) / max(1, len(times_s) - 1) if whole else float("inf")
        seen.append(Seen(ttft_s, tpot_s, record["met"]))
    return seen


def _predicted(profile: Profile, one: Run, settings: configs.Config) -> list[Seen]:
    document, run = one
    options, errands = document["options"], Errands(**document["errands"])
    slo = Slo(options["ttft_ms"] / 1e3, options["tpot_ms"] / 1e3)
    arrivals = _arrivals(document, run, settings)
    rest = document["at_rest"]
    machine = profile.shared(
        rest["busy"] - (rest["others"] or 0.0), request_s=errands.request_s, token_s=errands.token_s
    )
    machine = replace(machine, course=_course(run))
    trips = simulate(_cluster(profile, document, settings, machine), arrivals).trips[options["warmup"] :]
    seen = []
    for trip in trips:
        done, ttft_s = trip.end is End.FINISHED, trip.ttft_s + errands.first_s
        met = done and ttft_s <= slo.ttft_s and trip.tpot_s <= slo.tpot_s
        seen.append(Seen(ttft_s if done else float("inf"), trip.tpot_s if done else float("inf"), met))
    return seen


def _course(run: Mapping[str, Any]) -> tuple[tuple[float, float], ...]:
    """How many times longer than at the run's pulse everything took, from when on."""
    return tuple((max(0.0, at_s), pulse_s / run["pulse_s"]) for at_s, pulse_s in run.get("course", ()))


def _met(seen: Sequence[Seen]) -> float:
    return sum(one.met for one in seen) / len(seen)


def _cluster(
    profile: Profile, document: Mapping[str, Any], settings: configs.Config, machine: SharedMachine
) -> Cluster:
    """What served, as its configuration has it."""
    pools, server = {}, document["server"]
    for role, pool in (("prefill", settings.prefill), ("decode", settings.decode)):
        transport = server["transport"] or settings.handoff.transport
        cost = ProfiledReplica(
            profile, codec=server["codec"], transport=transport, kv_tokens=pool.kv_tokens, sends=role == "prefill"
        )
        limits = EngineLimits(
            pool.page_tokens, pool.step_tokens, pool.max_running, pool.max_waiting, pool.mixed_tokens, pool.gap_ms / 1e3
        )
        pools[role] = Pool(cost, server["pools"].get(role, 0), limits)
    return Cluster(
        pools["decode"],
        pools["prefill"] if pools["prefill"].replicas else None,
        max_inflight=settings.router.max_inflight,
        strategy=settings.router.strategy,
        affinity_factor=settings.router.affinity_factor,
        local_prefill=settings.router.local_prefill,
        admission=settings.admission,
        machine=machine,
    )


def _arrivals(document: Mapping[str, Any], run: Mapping[str, Any], settings: configs.Config) -> list[Arrival]:
    """All requests of one rate, drawn again as they were then."""
    chosen = goodput.options(shlex.split(document["command"])[3:])
    rate = run["rate_per_s"] if chosen.rate or chosen.sweep else None
    planned = goodput.plan(chosen, rate, settings.model.max_context)
    return [Arrival(one.at_s, one.prompt_tokens, one.output_tokens) for one in planned]


def falling(curve: Sequence[Point]) -> list[tuple[float, float]]:
    """Attainment by rate, made to fall: where more requests a second did better by chance, those rates count as one.

    Pool adjacent violators (Ayer et al. 1955), weighted by requests.
    """
    blocks: list[tuple[float, int, list[float]]] = []
    for rate, share, requests in sorted(curve):
        blocks.append((share, requests, [rate]))
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (one, some, rates), (other, more, rest) = blocks[-2:]
            blocks[-2:] = [((one * some + other * more) / (some + more), some + more, rates + rest)]
    return [(rate, share) for share, _, rates in blocks for rate in rates]


def crossing(curve: Sequence[tuple[float, float]], share: float = 0.9) -> float | None:
    """The rate at which attainment falls through ``share``, linear between the rates tried; None when it never does."""
    ordered = sorted(curve)
    for (rate, above), (next_rate, below) in pairwise(ordered):
        if above >= share > below:
            return rate + (next_rate - rate) * (above - share) / (above - below)
    return None


def lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What :func:`compare` found, for people."""
    for row in rows:
        head = f"{_pools(row)}, {row['prompt']} tokens"
        if "goodput" in row:
            values = row["goodput"]
            error = "not bracketed" if values["error"] is None else f"{values['error']:+.0%}"
            yield f"{head}: goodput {values['measured']} measured, {values['predicted']} predicted: {error}"
        elif "disturbed" in row:
            yield f"{head}, {row['rate']:g}/s: disturbed: {row['disturbed']}"
        else:
            told = [f"{name} {row[name]['measured_ms']:.0f} ms {row[name]['error']:+.0%}" for name in FIGURES]
            met = row["attainment"]
            yield f"{head}, {row['rate']:g}/s: {', '.join(told)}; met {met['measured']:.0%} ({met['predicted']:.0%})"


def _pools(row: Mapping[str, Any]) -> str:
    return " + ".join(f"{count} {role}" for role, count in row["pools"].items() if count)


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Every error of :func:`compare` by setting and rate, with the goal as a band."""
    shown = [row for row in rows if "requests" in row]
    figure = Figure(figsize=(3 + 1.1 * len(shown), 5), layout="constrained")
    axis = figure.subplots()
    axis.axhspan(-100 * GOAL, 100 * GOAL, color="#d8ead8", label=f"within {GOAL:.0%}")
    for name, marker, colour in zip(FIGURES, "osD^", ("#3572e0", "#3a9d4a", "#a02c9c", "#d9452b"), strict=True):
        errors = [100 * row[name]["error"] for row in shown]
        axis.plot(range(len(shown)), errors, marker, color=colour, label=name.replace("_", " "))
    labels = ["\n".join((_pools(row), row["prompt"], f"{row['rate']:g}/s")) for row in shown]
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(shown)), labels, fontsize="small")
    axis.set(ylabel="predicted over measured, minus one (%)", title="The simulator against the real service")
    axis.legend(fontsize="small", ncols=5, loc="upper center")
    figure.savefig(path, dpi=110)
