"""``baton plan`` and ``baton workload``: files in, a table, a configuration and a report out."""

from __future__ import annotations

import os
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from baton.config_handoff import AUTO
from baton.errors import ConfigError
from placement import plan as plans
from placement import report, traces
from placement.composition import Space
from placement.fewest import fewest
from placement.goodput import Trial
from placement.hardware import BUILT_IN, Hardware
from placement.model_shape import ModelShape
from placement.outcome import Slo
from placement.profile import Profile, ProfiledReplica
from placement.search import Found, Scored, enough, search, with_help
from placement.spaces import gpu_space, profiled_space
from placement.tables import Tables
from placement.workload import SHARES, Description, Workload, describe

workload_app = typer.Typer(help="What comes to a cluster.", no_args_is_help=True)
console = Console()
progress = Console(stderr=True)


@workload_app.command("describe")
def describe_workload(
    file: Annotated[Path, typer.Argument(help="Azure .csv, Mooncake .jsonl or recorded .jsonl.")],
    plot: Annotated[Path | None, typer.Option(help="Where a PNG goes; none without it.")] = None,
) -> None:
    """Rates, burstiness, lengths and prefix share of a workload."""
    workload = traces.load(file)
    console.print(_described(describe(workload)))
    if plot is not None:
        report.draw_workload(workload, plot)
        console.print(f"plot: {plot}")


def plan(
    *,
    workload: Annotated[Path, typer.Option(help="Azure .csv, Mooncake .jsonl or recorded .jsonl.")],
    ttft_s: Annotated[float, typer.Option(help="Longest time to the first token, seconds.")],
    tpot_s: Annotated[float, typer.Option(help="Longest mean gap between tokens, seconds.")],
    attainment: Annotated[float, typer.Option(help="Share of requests that must meet both.")] = 0.9,
    model: Annotated[str, typer.Option(help="Built-in shape, config.json or its folder.")] = "llama-3.1-8b",
    hardware: Annotated[str, typer.Option(help=f"YAML file or one of {', '.join(BUILT_IN)}.")] = "h200-sxm",
    tables: Annotated[Path | None, typer.Option(help="Measured kernels, from `baton tables`.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="This machine, from `baton profile`; instead of hardware.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Accelerators (with --profile: worker processes) there are.")] = 8,
    rate: Annotated[
        float | None, typer.Option(help="Fewest accelerators for this rate; else the most goodput.")
    ] = None,
    pipeline: Annotated[
        bool, typer.Option("--pipeline", help="Pipeline stages as well: for study, workers have none.")
    ] = False,
    max_context: Annotated[int, typer.Option(min=2, help="Requests longer than this are left out.")] = 8192,
    requests: Annotated[int, typer.Option(min=0, help="Simulated per trial; 0 chooses.")] = 0,
    processes: Annotated[int, typer.Option(min=0, help="Simulate in so many processes; 0: all cores.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the configuration goes.")] = Path("plan.yaml"),
    page: Annotated[Path | None, typer.Option("--report", help="Where the HTML goes, its PNG beside it.")] = None,
) -> None:
    """Find the pools that meet the SLOs, and say why these."""
    trace = traces.load(workload).fitting(max_context)
    space, labels = _space(model, hardware, tables, profile, longest=_longest(trace), gap_s=tpot_s, pipeline=pipeline)
    if not space.whole:
        raise ConfigError(f"{labels['model']} does not fit {labels['hardware']} at any degree", field="hardware")
    slo = Slo(ttft_s, tpot_s, attainment)
    with ProcessPoolExecutor(processes or os.cpu_count() or 1) as executor:
        trial = Trial(trace, slo, requests or enough(space, gpus, trace, slo))
        found = search(space, gpus, trial, executor=executor, progress=progress.print)
        chosen = _chosen(found, gpus, rate, trial, executor)
        made = plans.make(chosen, found, trial, labels, executor=executor)
    console.print(_table(made))
    output.write_text(made.to_yaml(), encoding="utf-8")
    console.print(f"configuration: {output}")
    if page is not None:
        picture = page.with_suffix(".png")
        report.draw_plan(made, found, picture)
        report.write_html(made, picture, page)
        console.print(f"report: {page}, {picture}")


def _space(
    model: str, hardware: str, tables: Path | None, profile: Path | None, *, longest: int, gap_s: float, pipeline: bool
) -> tuple[Space, dict[str, str]]:
    if profile is not None:
        measured = Profile.load(profile)
        wire, kv_tokens = next(iter(measured.wires)), max(32768, longest)
        cost, sending = (
            ProfiledReplica(measured, codec=AUTO, transport=wire, kv_tokens=kv_tokens, sends=sends)
            for sends in (False, True)
        )
        return profiled_space(cost, sending, gap_s=gap_s), {"model": measured.model, "hardware": "worker as profiled"}
    shape, machine = ModelShape.load(model), Hardware.load(hardware)
    kernels = Tables.load(tables) if tables else None
    return gpu_space(shape, machine, kernels, longest=longest, gap_s=gap_s, pipeline=pipeline), {
        "model": shape.name,
        "hardware": machine.name,
    }


def _chosen(found: Found, gpus: int, rate: float | None, trial: Trial, executor: Executor) -> Scored:
    if not found.best:
        raise ConfigError("no way to run the model meets these SLOs at any rate", field="slo")
    if rate is None:
        return with_help(found.best[0], trial)
    chosen = fewest(found, gpus, rate, trial, executor=executor, progress=progress.print)
    if chosen is None:
        raise ConfigError(f"{rate:g} requests/s are not met; {found.best[0].goodput:.2f} are", field="rate")
    return chosen


def _longest(trace: Workload) -> int:
    return max(a.prompt_tokens + a.output_tokens for a in trace.arrivals)


def _table(made: plans.Plan) -> Table:
    table = Table("pool", "replicas", "TP", "PP", "GPUs", "tokens a step", "sequences a step", title="Plan")
    pools = {"prefill": made.prefill, "decode" if made.prefill else "co-located": made.decode}
    for name, pool in pools.items():
        if pool is not None:
            numbers = (pool.replicas, pool.tp, pool.pp, pool.gpus, pool.step_tokens, pool.max_running)
            table.add_row(name, *map(str, numbers))
    table.caption = "\n".join(made.story())
    return table


def _described(description: Description) -> Table:
    table = Table("", "mean", *(f"p{share * 100:g}" for share in SHARES), "longest", title=description.name)
    for name, lengths in (("prompt tokens", description.prompt), ("output tokens", description.output)):
        table.add_row(name, f"{lengths.mean:.0f}", *(f"{p:.0f}" for p in lengths.percentiles), str(lengths.longest))
    share = "unknown" if description.prefix_share is None else f"{description.prefix_share:.2%} of blocks"
    table.caption = (
        f"{description.requests} requests in {description.span_s:.0f} s: {description.rate:.2f}/s, "
        f"busiest minute {description.minute_peak:.2f} times the mean\n"
        f"CV of gaps {description.gap_cv:.2f}; prompt and output correlate {description.length_correlation:+.2f}; "
        f"prefix share {share}"
    )
    return table
