"""Measured runs as one PNG: TTFT and TPOT distributions, where the time went, attainment against rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from baton.ledger import STAGES
from bench.stats import ATTAINMENT, Record, Slo, attainment, mean_stages

COLOURS = dict(
    zip(
        STAGES,
        ("#8c8c8c", "#d9a400", "#3572e0", "#a02c9c", "#d65fd2", "#d9452b", "#e8c84a", "#3a9d4a", "#7a0a0a", "#c9c9c9"),
        strict=True,
    )
)


@dataclass(frozen=True, slots=True)
class Run:
    """One rate and what it showed, warm-up excluded."""

    rate_per_s: float
    records: Sequence[Record]


def draw(runs: Sequence[Run], slo: Slo, title: str, path: Path) -> None:
    """Writes the picture of ``runs`` to ``path``."""
    swept = len(runs) > 1
    figure = Figure(figsize=(20 if swept else 15, 4.5), layout="constrained")
    axes = figure.subplots(1, 4 if swept else 3)
    figure.suptitle(title)
    good = [(run.rate_per_s, [record for record in run.records if record.ok]) for run in runs]
    _cumulative(axes[0], [(rate, [one.ttft_s for one in records]) for rate, records in good], slo.ttft_s, "TTFT")
    _cumulative(
        axes[1],
        [(rate, [one.tpot_s for one in records if one.output_tokens > 1]) for rate, records in good],
        slo.tpot_s,
        "TPOT",
    )
    _stages(axes[2], runs)
    if swept:
        _attainment(axes[3], runs, slo)
    figure.savefig(path, dpi=110)


def _cumulative(axis: Any, series: Sequence[tuple[float, list[float]]], limit_s: float, name: str) -> None:
    for rate_per_s, values_s in series:
        ordered = sorted(values_s)
        shares = [(rank + 1) / len(ordered) for rank in range(len(ordered))]
        axis.step([value * 1e3 for value in ordered], shares, where="post", label=f"{rate_per_s:g} req/s")
    axis.axvline(limit_s * 1e3, color="black", linestyle=":", label=f"SLO {limit_s * 1e3:g} ms")
    axis.set(xlabel=f"{name} (ms)", ylabel="share of completed requests", ylim=(0, 1), title=f"{name} distribution")
    axis.legend()


def _stages(axis: Any, runs: Sequence[Run]) -> None:
    labels = [f"{run.rate_per_s:g}" for run in runs]
    means = [mean_stages(run.records) for run in runs]
    bottom = [0.0] * len(runs)
    for name in STAGES:
        heights = [mean.get(name, 0.0) * 1e3 for mean in means]
        axis.bar(labels, heights, bottom=bottom, color=COLOURS[name], label=name, width=0.6)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    axis.set(xlabel="request rate (1/s)", ylabel="mean time of a request (ms)", title="Stage ledger")
    axis.legend(reverse=True, fontsize="small")


def _attainment(axis: Any, runs: Sequence[Run], slo: Slo) -> None:
    points = sorted((run.rate_per_s, attainment(run.records, slo)) for run in runs)
    axis.plot([rate for rate, _ in points], [share for _, share in points], marker="o")
    axis.axhline(ATTAINMENT, color="black", linestyle=":", label=f"{ATTAINMENT:.0%}")
    axis.set(xlabel="request rate (1/s)", ylabel="share that met both limits", ylim=(0, 1.02), title="SLO attainment")
    axis.legend()
