"""Routing strategies on a replay of Mooncake's conversations: ``python -m bench.affinity``.

What runs is the real code: schedulers with their prefix caches, their journals of cache events, the router's index and
its strategies, each as old as in a cluster. What is simulated is compute: a 70B-shaped model on H200 by the roofline of
``placement``. Only prompts are computed, since TTFT is the question: every request asks for one token.

Two workloads. The trace (FAST'25; its block hashes say which prompts begin alike), at two loads: prompt tokens that
come over those that the workers could compute without any cache. And a hot prefix: half of all requests begin with the
same 8,192 tokens, more than twice as many as one worker could take.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure

from baton.config_routing import RoutingConfig, Strategy
from bench.report import FOLDER, save
from placement import roofline, traces
from placement.cluster import Cluster, Pool
from placement.cost import CostModel
from placement.hardware import Hardware
from placement.linear import LinearCost
from placement.model_shape import ModelShape
from placement.outcome import Outcome
from placement.replica import EngineLimits
from placement.simulator import simulate
from placement.workload import Arrival, Workload

TRACE = Path(__file__).parents[2] / "shared" / "data" / "traces" / "mooncake_conversation.jsonl"
FACTOR = RoutingConfig().affinity_factor
STICKY = 1e9  # a factor at which the prefix is followed into any queue
WORKERS, TP = 8, 4
LIMITS = EngineLimits(page_tokens=512, step_tokens=8192, max_running=64, max_waiting=1 << 20)
FREE = Pool(LinearCost(0.0, 0.0, 0.0, 0.0, capacity_tokens=1 << 28), 1, replace(LIMITS, max_running=1 << 20))
HOT_TOKENS, HOT_SHARE = 8192, 0.5
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Way:
    name: str
    strategy: Strategy
    factor: float = FACTOR


WAYS = (
    Way("random", "random"),
    Way("round robin", "round_robin"),
    Way("least load", "least_load"),
    Way("least TTFT", "least_ttft"),
    Way("affinity", "prefix_affinity"),
    Way("affinity x 3", "prefix_affinity", 3.0),
    Way("affinity, sticky", "prefix_affinity", STICKY),
)


def main(
    requests: Annotated[
        int, typer.Option(help="Of the trace, from its beginning; half as many with a hot prefix.")
    ] = 8000,
) -> None:
    started_s, cost = time.process_time(), _cost()
    rows: dict[str, dict[str, Any]] = {}
    trace, hot = traces.load(TRACE).first(requests), hot_prefix(requests // 2, seed=7)
    for name, workload, load in (("conversation", trace, 0.75), ("dense", trace, 1.1), ("hot prefix", hot, 2.5)):
        paced = workload.at_rate(load * WORKERS / _mean_s(cost, workload))
        hottest = Counter(arrival.blocks[0] for arrival in paced.arrivals).most_common(1)[0][1]
        share = hottest / len(paced.arrivals)
        rows[name] = {
            "load": load,
            "rate": paced.rate,
            "requests": len(paced.arrivals),
            "hottest_share": share,
            "ways": {},
        }
        for way in WAYS:
            rows[name]["ways"][way.name] = row = _run(way, cost, paced)
            print(f"{name:12s} {way.name:16s} " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    _draw(rows, FOLDER / "affinity.png")
    setting = {
        "model": "llama-3.1-70b", "worker": f"{TP} x h200-sxm, roofline", "workers": WORKERS,
        "page_tokens": LIMITS.page_tokens, "kv_tokens": cost.kv_tokens(), "affinity_factor": FACTOR,
    }  # fmt: skip
    save("affinity", {**setting, "cpu_s": time.process_time() - started_s, "workloads": rows})


def hot_prefix(requests: int, *, seed: int) -> Workload:
    """``HOT_SHARE`` of the requests begin alike; all have 1 to 8 further blocks of their own."""
    random, block = np.random.default_rng(seed), LIMITS.page_tokens
    prefix = tuple(range(HOT_TOKENS // block))
    arrivals, fresh = [], len(prefix)
    for at_s in np.cumsum(random.exponential(1.0, requests)):
        own = int(random.integers(1, 9))
        blocks = (prefix if random.random() < HOT_SHARE else ()) + tuple(range(fresh, fresh + own))
        fresh += own
        arrivals.append(Arrival(float(at_s), len(blocks) * block, 1, blocks))
    return Workload("hot prefix", tuple(arrivals), block)


def _cost() -> CostModel:
    return roofline.replica(ModelShape.load("llama-3.1-70b"), Hardware.load("h200-sxm"), tp=TP)


def _mean_s(cost: CostModel, workload: Workload) -> float:
    """Seconds that one worker needs for a mean prompt, nothing cached, in whole steps."""
    size = LIMITS.step_tokens
    totals = []
    for arrival in workload.arrivals[:1000]:
        starts = range(0, arrival.prompt_tokens, size)
        chunks = [(start, min(size, arrival.prompt_tokens - start)) for start in starts]
        totals.append(sum(cost.sum_s((chunk,), 0, 0) for chunk in chunks))
    return sum(totals) / len(totals)


def _run(way: Way, cost: CostModel, workload: Workload) -> dict[str, float]:
    prefill = Pool(cost, WORKERS, LIMITS)
    cluster = Cluster(FREE, prefill, strategy=way.strategy, affinity_factor=way.factor, attempts=1)
    arrivals = [replace(arrival, output_tokens=1) for arrival in workload.arrivals]
    outcome = simulate(cluster, arrivals, block_tokens=workload.block_tokens)
    return _figures(outcome)


def _figures(outcome: Outcome) -> dict[str, float]:
    """TTFT; ``hit``: share of prompt tokens found in a cache; ``max_mean``: the busiest worker over the mean."""
    ttft_s = np.array([trip.ttft_s for trip in outcome.trips])
    if np.isnan(ttft_s).any():
        raise RuntimeError(f"{int(np.isnan(ttft_s).sum())} requests got no token")
    uses = [use for name, use in outcome.workers.items() if name.startswith("prefill")]
    busy_s = np.array([use.busy_s for use in uses])
    return {
        "mean_s": float(ttft_s.mean()),
        **{f"p{share * 100:g}_s": float(np.quantile(ttft_s, share)) for share in QUANTILES},
        "hit": sum(use.hit_tokens for use in uses) / sum(use.entered_tokens for use in uses),
        "max_mean": float(busy_s.max() / busy_s.mean()),
        "utilization": float(busy_s.mean() / outcome.finished_s),
    }


def _draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(15, 4.5 * len(rows)), layout="constrained")
    figure.suptitle(f"{WORKERS} prefill workers, llama-3.1-70b on {TP} H200 each (simulated compute, real routing)")
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for axes, (name, row) in zip(grid, rows.items(), strict=True):
        ways = row["ways"]
        _bars(axes[0], ways, ("mean_s", "p90_s"), f"{name}: TTFT (s)")
        _bars(axes[1], ways, ("hit",), "share of prompt tokens cached")
        _bars(axes[2], ways, ("max_mean",), "busiest worker over the mean")
        axes[0].set_yscale("log")
    figure.savefig(path, dpi=90)


def _bars(axis: Any, ways: dict[str, dict[str, float]], keys: Sequence[str], title: str) -> None:
    width = 0.8 / len(keys)
    for offset, key in enumerate(keys):
        places = [place + offset * width for place in range(len(ways))]
        axis.bar(places, [row[key] for row in ways.values()], width=width, label=key.removesuffix("_s"))
    axis.set_xticks([place + 0.4 - width / 2 for place in range(len(ways))], list(ways), rotation=30, ha="right")
    axis.set_title(title)
    if len(keys) > 1:
        axis.legend()


if __name__ == "__main__":
    typer.run(main)
