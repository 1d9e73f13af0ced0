"""Predicted against measured: the requests of ``bench.goodput``, warm-up too, go through the simulator when due."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from baton import config as configs
from bench import goodput
from placement.cluster import Cluster, Pool
from placement.outcome import Outcome, Slo
from placement.profile import Profile, ProfiledReplica
from placement.replica import EngineLimits
from placement.simulator import simulate
from placement.workload import Arrival

MEASURES = ("ttft", "tpot")
SHARES = (50, 90)


def compare(profile: Profile, document: dict[str, Any], settings: configs.Config) -> Iterator[dict[str, Any]]:
    """One row per measured rate, and one for the goodput where several rates were tried."""
    server, options = document["server"], document["options"]
    cluster = _cluster(profile, document, settings)
    slo = Slo(options["ttft_ms"] / 1e3, options["tpot_ms"] / 1e3)
    predicted_curve, measured_curve = [], []
    for run in document["runs"]:
        outcome = _counted(simulate(cluster, _arrivals(document, run, settings)), options["warmup"])
        row: dict[str, Any] = {"pools": server["pools"], "prompt": options["prompt"], "rate": run["rate_per_s"]}
        for share in SHARES:
            for name, seconds in zip(MEASURES, outcome.percentiles(share / 100), strict=True):
                true_ms = run["summary"][f"{name}_ms"][f"p{share}"]
                row[f"{name}_p{share}"] = {"measured_ms": true_ms, "predicted_ms": 1e3 * seconds,
                                           "error": 1e3 * seconds / true_ms - 1}  # fmt: skip
        row["attainment"] = {"measured": run["summary"]["attainment"], "predicted": outcome.attainment(slo).joint}
        predicted_curve.append((run["rate_per_s"], outcome.attainment(slo).joint))
        measured_curve.append((run["rate_per_s"], run["summary"]["attainment"]))
        names = [f"{name}_p{share}" for share in SHARES for name in MEASURES]
        print(row["pools"], row["rate"], {name: f"{row[name]['error']:+.1%}" for name in names}, row["attainment"])
        yield row
    if len(document["runs"]) > 1:
        true, guess = _crossing(measured_curve), _crossing(predicted_curve)
        error = guess / true - 1 if guess and true else None
        print(server["pools"], "goodput", true, guess, error)
        yield {"pools": server["pools"], "goodput": {"measured": true, "predicted": guess, "error": error}}


def _cluster(profile: Profile, document: dict[str, Any], settings: configs.Config) -> Cluster:
    """What served, as its configuration has it, on what the machine at rest left of its cores."""
    pools, server = {}, document["server"]
    for role, pool in (("prefill", settings.prefill), ("decode", settings.decode)):
        transport = server["transport"] or settings.handoff.transport
        cost = ProfiledReplica(profile, codec=server["codec"], transport=transport, kv_tokens=pool.kv_tokens)
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
        slowdown=profile.slowdown(pools["decode"].replicas + pools["prefill"].replicas, document["at_rest"]["busy"]),
    )


def _arrivals(document: dict[str, Any], run: dict[str, Any], settings: configs.Config) -> list[Arrival]:
    """All requests of one rate, drawn again as they were then."""
    chosen = goodput.options(shlex.split(document["command"])[3:])
    rate = run["rate_per_s"] if chosen.rate or chosen.sweep else None
    planned = goodput.plan(chosen, rate, settings.model.max_context)
    return [Arrival(one.at_s, one.prompt_tokens, one.output_tokens) for one in planned]


def _counted(outcome: Outcome, warmup: int) -> Outcome:
    return replace(outcome, trips=outcome.trips[warmup:])


def _crossing(curve: Sequence[tuple[float, float]], share: float = 0.9) -> float | None:
    """The rate at which attainment falls through ``share``, linear between the rates tried; None when it never does."""
    ordered = sorted(curve)
    for (rate, above), (next_rate, below) in pairwise(ordered):
        if above >= share > below:
            return rate + (next_rate - rate) * (above - share) / (above - below)
    return None
