"""Pictures and pages of plans and workloads: PNG by matplotlib (the ``bench`` extra), HTML that needs nothing else."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from baton.errors import ConfigError
from placement.plan import Plan
from placement.search import Found
from placement.workload import Workload


def draw_plan(plan: Plan, found: Found, path: Path) -> None:
    """Attainment and use of the pools against the rate; and cost against goodput of the variants and other numbers."""
    figure, (attainment, use, pareto) = _figure(3)
    rates = [point.rate for point in plan.curve]
    for name, style in (("joint", "o-"), ("ttft", "v--"), ("tpot", "^--")):
        shares = [100 * getattr(point.attainment, name) for point in plan.curve]
        attainment.plot(rates, shares, style, label={"joint": "both"}.get(name, name.upper()))
    attainment.axhline(100 * plan.slo.attainment, color="grey", linewidth=0.8)
    attainment.axvline(plan.goodput, color="grey", linewidth=0.8, linestyle=":")
    _label(attainment, "requests per second", "% of requests within the SLO")
    if plan.prefill:
        use.plot(rates, [100 * point.prefill_busy for point in plan.curve], "v-", label="prefill")
    use.plot(rates, [100 * point.decode_busy for point in plan.curve], "^-", label="decode")
    _label(use, "requests per second", "% of time in steps")
    for scored in found.best:
        variant = (
            "co-located" if scored.composition.prefill is None else f"split, {scored.composition.affinity} affinity"
        )
        pareto.plot(scored.composition.gpus, scored.goodput, "o", label=variant)
    line = sorted([*((other.gpus, other.goodput) for other in plan.frontier), (plan.gpus, plan.goodput)])
    pareto.plot(*zip(*line, strict=True), "-", color="grey", label="best split promised of so many")
    pareto.plot(plan.gpus, plan.goodput, "x", markersize=12, color="black", label="this plan")
    for label, alone in (("prefill alone", found.prefill_alone), ("decode alone", found.decode_alone)):
        pareto.plot([way.gpus for way, _ in alone], [rate for _, rate in alone], ".", label=label)
    pareto.set_xscale("log", base=2)
    pareto.set_yscale("log")
    _label(pareto, "accelerators", "goodput, requests per second")
    _save(figure, path)


def draw_workload(workload: Workload, path: Path) -> None:
    """Arrivals per ten seconds, the gaps' distribution against a Poisson process, and lengths."""
    figure, (arrivals, gaps, lengths) = _figure(3)
    times = np.array([a.at_s for a in workload.arrivals])
    arrivals.plot(np.bincount((times // 10).astype(int)) / 10)
    _label(arrivals, "tens of seconds", "requests per second", legend=False)
    between = np.sort(np.diff(times)) if len(times) > 1 else np.array([0.0])
    left = 1 - np.arange(len(between)) / len(between)
    gaps.plot(between, left, label=workload.name)
    gaps.plot(between, np.exp(-between * workload.rate), "--", label="Poisson")
    gaps.set_yscale("log")
    gaps.set_ylim(bottom=max(1e-5, 0.5 / len(between)))
    _label(gaps, "gap, s", "share of longer gaps")
    for name in ("prompt_tokens", "output_tokens"):
        values = np.sort([getattr(a, name) for a in workload.arrivals])
        lengths.plot(values, np.linspace(0, 1, len(values)), label=name.replace("_", " "))
    lengths.set_xscale("log")
    _label(lengths, "tokens", "share of requests")
    _save(figure, path)


def write_html(plan: Plan, picture: Path, path: Path) -> None:
    """One page with the picture inside it."""
    image = base64.b64encode(picture.read_bytes()).decode()
    header = (
        "requests/s",
        "both",
        "TTFT",
        "TPOT",
        "p90 TTFT s",
        "p90 TPOT s",
        "prefill busy",
        "decode busy",
        "refused",
    )
    rows = [
        (
            f"{p.rate:.2f}", f"{p.attainment.joint:.1%}", f"{p.attainment.ttft:.1%}", f"{p.attainment.tpot:.1%}",
            f"{p.ttft_p90_s:.3f}", f"{p.tpot_p90_s:.4f}", f"{p.prefill_busy:.0%}", f"{p.decode_busy:.0%}", p.refused,
        )
        for p in plan.curve
    ]  # fmt: skip
    story = "".join(f"<li>{html.escape(line)}</li>" for line in plan.story())
    path.write_text(
        f"<!doctype html><meta charset=utf-8><title>Plan for {html.escape(plan.model)}</title>"
        "<style>body{font:16px sans-serif;max-width:72em;margin:2em auto}td,th{padding:.2em .8em;text-align:right}"
        f"img{{width:100%}}</style><h1>Plan for {html.escape(plan.model)}</h1><ul>{story}</ul>"
        f'<img alt="attainment, use and cost" src="data:image/png;base64,{image}">'
        f"<table>{_row('th', header)}{''.join(_row('td', row) for row in rows)}</table>"
        f"<h2>Configuration</h2><pre>{html.escape(plan.to_yaml())}</pre>",
        encoding="utf-8",
    )


def _row(tag: str, cells: Iterable[object]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"


def _figure(columns: int) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install 'baton[bench]'", field="report") from None
    figure = Figure(figsize=(5 * columns, 4), layout="constrained")
    return figure, figure.subplots(1, columns)


def _label(axes: Any, x: str, y: str, *, legend: bool = True) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize="small")


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
