"""``baton profile``: measures this machine's engine and handoff and writes a profile file for ``baton plan``."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from baton.config import Config, load
from baton.config_handoff import CODECS
from baton.errors import ConfigError
from placement.profile import Machine, Profile, Serving
from placement.step_fit import LEAST_STEPS, StepFit, held_out
from placement.tables import Tables

if TYPE_CHECKING:
    from engine.model import Model
    from placement.measure import Clock

BUSY = 0.85  # below it the machine was not ours alone

console = Console(stderr=True)


def profile(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the profile goes.")] = Path("profile.json"),
    config: Annotated[Path | None, typer.Option("--config", help="YAML file; see docs/config.md.")] = None,
    model: Annotated[str | None, typer.Option(help="Model name, Hugging Face folder or id, or .gguf file.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: what suits this machine.")] = None,
    threads: Annotated[int, typer.Option(help="Torch threads of one worker; 0 takes the configuration's.")] = 0,
    transport: Annotated[str | None, typer.Option(help="nixl or tcp; default: the configuration's.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often every shape is measured.")] = 3,
    busy: Annotated[bool, typer.Option(help="Time CPU seconds: for one thread on a machine that others use.")] = False,
) -> None:
    """Measure engine steps, codecs and the wire on this machine (some minutes; Ctrl-C keeps what was measured)."""
    settings = load(config).with_flags({"model.id": model, "model.dtype": dtype, "handoff.transport": transport})
    if busy and threads != 1:
        raise ConfigError("CPU seconds stand for time only with --threads 1", field="threads")
    threads = threads or settings.decode.threads or (os.cpu_count() or 1)
    with _reporter() as report:
        measured = run(settings, threads, report, rounds=rounds, clock="cpu" if busy else "wall")
    measured.save(output)
    _summary(measured, output)
    if not measured.complete:
        raise typer.Exit(130)


def convert_tables(
    folder: Annotated[Path, typer.Argument(help="Folder of Parquet files in aiconfigurator's form.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npz that `baton plan --tables` reads.")],
    check: Annotated[bool, typer.Option(help="Print the 5-fold held-out error of every table (a minute).")] = True,
) -> None:
    """Convert measured kernel tables to the planner's compact form."""
    tables = Tables.load(folder)
    tables.save(output)
    console.print(f"{tables.device}: {len(tables.grids)} tables in {output}")
    if check:
        for name, error in tables.held_out():
            print(f"{name:24} {error}")


def run(
    settings: Config, threads: int, progress: Callable[[str, float], None], *, rounds: int, clock: Clock
) -> Profile:
    """The whole measurement: codecs and wire first (seconds), then steps until done or interrupted."""
    from engine import hub
    from engine.build import load_model
    from engine.text import Tokenizer
    from placement.measure import measure_steps
    from placement.measure_beside import Worker, measure_beside
    from placement.measure_handoff import measure_codecs, measure_wire
    from placement.measure_served import measure_served
    from placement.pulse import Pulse

    folder = hub.resolve(settings.model.id, settings.model.cache_dir, progress)
    model = load_model(folder, settings.model.dtype, threads)
    max_context = min(settings.model.max_context, model.spec.max_context)
    progress("codecs", 0.0)
    codecs = measure_codecs(model, Tokenizer(folder).encode, CODECS, max_context)
    wire: str = settings.handoff.transport
    progress(f"{wire} between two processes", 0.0)
    wires = {wire: measure_wire(wire, settings.handoff.ucx_tls)}
    beside, serving = 1.0, Serving()
    if clock == "wall" and not _accelerator(model):  # workers on GPUs have one each
        progress("steps beside another worker", 0.0)
        worker = Worker(folder, settings.model.dtype, threads, settings.decode, max_context)
        beside = measure_beside(model, worker)
        progress("requests through workers", 0.0)
        serving = measure_served(model, folder, settings)
    with Pulse() as pulse:
        pulse.read()
        steps = measure_steps(model, settings.decode, max_context, progress, rounds=rounds, clock=clock)
        pulse_s = pulse.read()
    layout = model.layout
    return Profile(
        machine=_machine(model),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=settings.model.id,
        fingerprint=layout.fingerprint,
        dtype=layout.dtype,
        threads=threads,
        layers=layout.layers,
        token_bytes=layout.token_bytes,
        page_tokens=settings.decode.page_tokens,
        complete=steps.complete,
        clock=clock,
        cpu_share=steps.cpu_share,
        steps=steps.observations,
        codecs=codecs,
        wires=wires,
        beside=beside,
        serving=serving,
        pulse_s=pulse_s,
    )


def _machine(model: Model) -> Machine:
    import torch

    return Machine(_processor(), _accelerator(model), os.cpu_count() or 1, platform.platform(), torch.__version__)


def _accelerator(model: Model) -> str:
    """Its name; "" on CPU."""
    import torch

    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@contextlib.contextmanager
def _reporter() -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, else a line for each tenth."""
    if not console.is_terminal:
        told: dict[int, None] = {}

        def line(what: str, part: float) -> None:
            tenth = int(10 * part)
            if tenth not in told:
                told[tenth] = None
                console.print(f"{10 * tenth:3} %  {what}")

        yield line
        return
    columns = (TextColumn("{task.description:44}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("loading the model", total=1.0)
        yield lambda what, part: bar.update(task, description=what, completed=part)


def _summary(measured: Profile, output: Path) -> None:
    state = "" if measured.complete else " (interrupted)"
    console.print(f"{measured.model} in {measured.dtype} on {measured.machine.processor}: {output}{state}")
    if len(measured.steps) < LEAST_STEPS:
        console.print(f"{len(measured.steps)} steps are too few for a fit of {LEAST_STEPS}")
        return
    if not measured.machine.accelerator and measured.cpu_share < BUSY:
        console.print(f"the steps had {measured.cpu_share:.0%} of their cores: others used this machine meanwhile")
    fit = StepFit.of(measured.steps)
    print(f"beside     another worker that computes, a step takes {measured.beside:.2f} times as long")
    added = measured.serving
    print(f"serving    adds {1e3 * added.chunk_s:.0f} ms to a chunk whose KV leaves behind it, "
          f"{1e3 * added.step_s:.1f} ms to a step of a decode worker")  # fmt: skip
    print(f"steps      {len(measured.steps)} shapes; held out: {held_out(measured.steps)}")
    print(f"decode     {1e3 * (fit.base_s + fit.decode_s + fit.rows_s(1)):.1f} ms for one, "
          f"{1e3 * (fit.base_s + 32 * fit.decode_s + fit.rows_s(32)):.1f} ms for 32, "
          f"and {1e6 * fit.context_s:.2f} us per token of context")  # fmt: skip
    chunk = fit.base_s + fit.chunk_s + fit.rows_s(512) + fit.inside_s * 512 * 512 / 2
    print(f"prefill    {512 / chunk:.0f} tokens/s in chunks of 512")
    for name, codec in measured.codecs.items():
        print(f"{name:10} {codec.ratio:.2f}x, {codec.encode.bytes_per_s / 1e9:.2f} GB/s to encode, "
              f"{codec.decode.bytes_per_s / 1e9:.2f} to decode; "
              f"{1e6 * codec.encode.layer_s:.0f} + {1e6 * codec.decode.layer_s:.0f} us a layer")  # fmt: skip
    for name, wire in measured.wires.items():
        print(f"{name:10} {wire.bytes_per_s / 1e9:.2f} GB/s, {1e6 * wire.layer_s:.0f} us a fetch")
