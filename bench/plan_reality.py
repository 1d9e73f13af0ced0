"""Predicted against measured: a run of ``bench.goodput`` goes through the simulator at the times it was due."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from baton import config as configs
from placement.outcome import Slo
from placement.profile import Profile, ProfiledReplica
from placement.replica import EngineLimits
from placement.simulator import Cluster, Pool, simulate
from placement.workload import Arrival


def compare(profile: Profile, document: dict[str, Any], settings: configs.Config) -> Iterator[dict[str, Any]]:
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
