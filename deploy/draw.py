"""What the command line shows: a stage ledger as a bar, a deployment's state as a table, a model's fetching."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from baton.ledger import STAGES, Ledger
from baton.wire import inference_pb2 as pb

BAR_CELLS = 72
STYLES: Mapping[str, str] = {
    "admit": "black on bright_black",
    "queue": "black on yellow",
    "prefill": "black on bright_blue",
    "encode": "black on magenta",
    "wire": "black on bright_magenta",
    "land": "black on bright_red",
    "wait": "black on bright_yellow",
    "decode": "black on bright_green",
    "recover": "black on red",
    "deliver": "black on white",
}
_UNKNOWN_STYLE = "white on black"
_STATES = {
    pb.WORKER_STATE_CONNECTING: Text("connecting", "yellow"),
    pb.WORKER_STATE_READY: Text("ready", "green"),
    pb.WORKER_STATE_DRAINING: Text("draining", "yellow"),
    pb.WORKER_STATE_LOST: Text("lost", "red"),
    pb.WORKER_STATE_SUSPECT: Text("suspect", "red"),
}


def cells(stages: Mapping[str, float], width: int) -> dict[str, int]:
    """Whole cells per stage in proportion to its seconds, summing to ``width`` (to 0 when no time was spent).

    Rounded by largest remainder, so no stage is off by a whole cell.
    """
    total_s = sum(stages.values())
    if total_s <= 0.0:
        return dict.fromkeys(stages, 0)
    exact = {name: seconds / total_s * width for name, seconds in stages.items()}
    whole = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: whole[name] - exact[name])
    for name in by_remainder[: width - sum(whole.values())]:
        whole[name] += 1
    return whole


def milliseconds(seconds: float) -> str:
    """``seconds`` in ms with three significant digits below 100 ms, and whole ms above."""
    ms = seconds * 1e3
    return f"{ms:.2f} ms" if ms < 10.0 else f"{ms:.1f} ms" if ms < 100.0 else f"{ms:,.0f} ms"


def size(count: int) -> str:
    """``count`` bytes in the largest binary unit that keeps it at least 1."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024.0:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024.0
    return f"{amount:.1f} GiB"


def stage_ledger(ledger: Ledger, *, width: int = BAR_CELLS) -> RenderableType:
    """The ledger as a bar of at most ``width`` cells, with a legend in ms and the handoff in words."""
    stages = {name: ledger.stages.get(name, 0.0) for name in STAGES}
    bar = Text(no_wrap=True)
    for name, count in cells(stages, width).items():
        if count:
            bar.append(_segment(name, count), STYLES.get(name, _UNKNOWN_STYLE))
    legend = Table.grid(padding=(0, 2))
    entries = [_entry(name, seconds) for name, seconds in stages.items() if seconds > 0.0]
    for start in range(0, len(entries), 3):
        legend.add_row(*entries[start : start + 3])
    return Group(bar, legend, Text(_summary(ledger), "dim"))


def _segment(name: str, count: int) -> str:
    """A thin left edge, so that neighbours differ without colour too, and the name where it fits."""
    room = count - 1
    return "▏" + (name.center(room) if len(name) <= room else " " * room)


def _entry(name: str, seconds: float) -> Text:
    swatch = STYLES.get(name, _UNKNOWN_STYLE).rpartition(" ")[2]
    return Text.assemble(("■ ", swatch), f"{name:<8}", (f"{milliseconds(seconds):>11}", "bold"))


def _summary(ledger: Ledger) -> str:
    total = f"total {milliseconds(ledger.total_s)}"
    if not ledger.transport:
        return f"{total}; computed on one worker, nothing was handed over"
    return (
        f"{total}\nhandoff {size(ledger.transfer_bytes)} as {ledger.codec} by {ledger.transport}: "
        f"{milliseconds(ledger.transfer_busy_s)} of work, {ledger.transfer_hidden_share:.0%} hidden behind prefill"
    )


def status(answer: pb.GetStatusResponse) -> RenderableType:
    """Pools, workers, what they hold, and the counts of the router that answered."""
    table = Table(header_style="bold", pad_edge=False, box=None)
    table.add_column("worker", overflow="fold")
    table.add_column("state")
    for heading in ("running", "waiting", "pages", "buffers"):
        table.add_column(heading, justify="right", no_wrap=True)
    for pool in answer.pools:
        for worker in pool.workers:
            table.add_row(*_worker_cells(pool.role, worker))
        if not pool.workers:
            table.add_row(pool.role, Text("none", "red"))
    router = answer.router
    counts = Text(
        f"router {router.id}: {router.inflight} in flight, {router.accepted} accepted, {router.completed} completed, "
        f"{router.failed} failed, {router.cancelled} cancelled, {router.refused} refused, {router.tokens:,} tokens"
    )
    head = Text.assemble(
        "model ", (answer.model, "bold"), f"  layout {answer.layout or 'not known yet'}  transport ",
        (answer.transport, "bold"), "  codec ", (answer.codec, "bold"),
        f" ({answer.codecs_used})" if answer.codecs_used and answer.codecs_used != answer.codec else "",
        f"  quality floor {answer.quality_floor}",
    )  # fmt: skip
    return Group(head, Padding(table, (1, 0)), counts)


def _worker_cells(role: str, worker: pb.Worker) -> list[Text]:
    """A few lines a worker, so that the table fits 80 columns."""
    load = worker.load
    name = Text.assemble((role, "bold"), f" {worker.id}\n", (worker.address, "dim"))
    state = _STATES.get(worker.state, Text("unknown", "red"))
    if not worker.HasField("load"):
        return [name, state, *[Text("-")] * 4]
    return [
        name,
        _lines(state, f"{worker.load_age_s:.1f} s ago"),
        _lines(str(load.running), f"{load.handoffs} handoffs"),
        _lines(str(load.waiting), f"{load.waiting_tokens:,} tokens"),
        _lines(f"{load.pages_used:,}", f"of {load.pages_total:,}", f"peak {load.pages_high_water:,}"),
        _lines(size(load.buffer_bytes_used), f"of {size(load.buffer_bytes_total)}", *_quarantine(load)),
    ]


def _lines(first: str | Text, *details: str) -> Text:
    return Text.assemble(first, *((f"\n{detail}", "dim") for detail in details))


def _quarantine(load: pb.Load) -> list[str]:
    return [f"{size(load.buffer_bytes_quarantined)} quarantined"] if load.buffer_bytes_quarantined else []


@contextlib.contextmanager
def fetching(console: Console) -> Iterator[Callable[[str, float], None]]:
    """A bar that follows ``report(what, fraction)``; one line per ``what`` where there is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("looking", total=1.0)
        told = ""

        def report(what: str, fraction: float) -> None:
            nonlocal told
            if not console.is_terminal and what != told:
                console.print(what)
            told = what
            progress.update(task, description=what, completed=fraction)

        yield report
