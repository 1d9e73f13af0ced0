"""``baton codec explain``: what each codec would cost on a link, which one would be chosen there, and why."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from baton.errors import InvalidRequest

if TYPE_CHECKING:
    from baton.config import Config
    from baton.layout import KVLayout
    from kvtransfer.chooser import Ahead, Candidate, Choice, Ends, Link, Load, Regime, Speed

MEASURING_S = 10.0  # at most: a second or two, where the machine is free
_SCALE = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BANDWIDTH = re.compile(r"([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?)(bit|bps|b|B)(?:/s|ps)?", re.IGNORECASE)
_DURATION = re.compile(r"([0-9.]+(?:e-?[0-9]+)?)\s*(s|ms|us|µs)", re.IGNORECASE)
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}

codec_app = typer.Typer(help="The codecs that KV crosses in.", no_args_is_help=True)


@codec_app.callback()
def codec() -> None:
    """The codecs that KV crosses in."""


@codec_app.command()
def explain(
    *,
    bandwidth: Annotated[str | None, typer.Option(help="1Gbit, 2.5GB ...; default: measured on this machine.")] = None,
    latency: Annotated[
        str | None, typer.Option(help="Of one fetch: 50us, 2ms ...; default: 100us, or measured.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 1900,
    model: Annotated[str | None, typer.Option(help="Model name, Hugging Face folder or id, or .gguf file.")] = None,
    floor: Annotated[str | None, typer.Option(help="Quality floor; default: the configuration's.")] = None,
    prefill: Annotated[
        str, typer.Option(help="How long prefill still takes, behind which KV crosses: 300ms ...")
    ] = "0s",
    deadline: Annotated[str | None, typer.Option(help="Time left until everything must have landed.")] = None,
    handoffs: Annotated[int, typer.Option(min=1, help="Handoffs that share encoder, link and decoder.")] = 1,
    cores: Annotated[
        float | None, typer.Option(min=0.1, help="Processors of each worker; default: those of this process.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file; see docs/config.md.")] = None,
) -> None:
    """Show what every codec would cost for one prompt on one link, which one is chosen, and from where on others are.

    Speeds are measured on this machine, for both ends.
    """
    from baton.config import load
    from baton.config_handoff import CODECS
    from kvtransfer.chooser import Ahead, Link, Load
    from kvtransfer.codec_speeds import measure_codecs
    from kvtransfer.link_probe import measure_ends
    from kvtransfer.protocol import block_tokens

    settings = load(config).with_flags({"model.id": model, "handoff.quality_floor": floor})
    slack_s = math.inf if deadline is None else seconds("deadline", deadline)
    hidden_s = seconds("prefill", prefill)
    asked = None if bandwidth is None else bytes_per_s("bandwidth", bandwidth)
    latency_s = None if latency is None else seconds("latency", latency)
    layout = _layout(settings)
    link = _measured(settings) if asked is None else Link(asked, 1e-4)
    link = link if latency_s is None else Link(link.bytes_per_s, latency_s)
    candidates = measure_codecs(layout, CODECS, budget_s=MEASURING_S)
    chunk = min(settings.prefill.step_tokens, block_tokens(layout))
    ahead = Ahead(tokens * layout.token_bytes, layout.layers * -(-tokens // chunk), 0, hidden_s, slack_s)
    load_ = Load(handoffs, handoffs, handoffs)
    console = Console(highlight=False)
    ends = measure_ends(settings.handoff.transport, cores)
    console.print(_question(settings, layout, tokens, link, ahead))
    console.print(answer(candidates, settings.handoff.quality_floor, link, ahead, load_, ends=ends))
    console.print(_ends(settings.handoff.transport, ends))


def answer(
    candidates: tuple[Candidate, ...], floor: str, link: Link, ahead: Ahead, load: Load, *, ends: Ends
) -> RenderableType:  # fmt: skip
    """The table of all ``candidates``, the choice among those within ``floor``, and its break-evens."""
    from baton.config_handoff import codecs_within
    from kvtransfer.chooser import choose, regimes

    within = [one for one in candidates if one.name in codecs_within(floor)]
    choice = choose(within, link, ahead, load, ends=ends)
    return Group(
        _table(candidates, choice, link, ahead, load, ends=ends),
        Text(f"\nchosen: {choice.why()}"),
        Text(f"by bandwidth, with floor {floor}: {_regimes(regimes(within, link.latency_s, ahead, load, ends=ends))}"),
    )


def _table(
    candidates: tuple[Candidate, ...], choice: Choice, link: Link, ahead: Ahead, load: Load, *, ends: Ends
) -> Table:
    from baton.config_handoff import FLOORS
    from kvtransfer.chooser import estimate, pays_below

    allowed = {one.codec.name for one in choice.estimates}
    raw = next(one for one in candidates if one.name == "raw")
    table = Table(header_style="bold", pad_edge=False, box=None, collapse_padding=True)
    table.add_column("codec", no_wrap=True)
    for heading in ("floor", "ratio", "encode", "wire", "decode", "an end", "exposed", "beats raw"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in sorted(
        (estimate(codec, link, ahead, load, ends=ends) for codec in candidates), key=lambda one: one.total_s
    ):
        name = one.codec.name
        picked = name == choice.codec
        end_s = max(one.sender_s, one.receiver_s)
        times = [_ms(s) for s in (one.encode_s, one.wire_s, one.decode_s, end_s, one.exposed_s)]
        edge = "" if one.codec is raw else _edge(pays_below(one.codec, raw, link.latency_s, ahead, load, ends=ends))
        table.add_row(
            f"{'>' if picked else ' '} {name}", FLOORS[one.codec.loss], f"{one.codec.ratio:.2f}x", *times, edge,
            style="bold" if picked else "" if name in allowed else "dim",
        )  # fmt: skip
    return table


def _regimes(found: list[Regime]) -> str:
    if len(found) == 1:
        return f"always {found[0].codec}"
    upto = [f"{one.codec} up to {_rate(one.below_bytes_per_s)}" for one in found[:-1]]
    return ", ".join([*upto, f"then {found[-1].codec}"])


def _question(settings: Config, layout: KVLayout, tokens: int, link: Link, ahead: Ahead) -> Text:
    hidden = f"; prefill goes on for {_ms(ahead.prefill_s)}" if ahead.prefill_s else ""
    return Text(
        f"{tokens:,} tokens of {settings.model.id}: {ahead.raw_bytes / 1e6:,.1f} MB of {layout.dtype} KV in "
        f"{ahead.blocks:,} blocks; link {_rate(link.bytes_per_s)}, {_ms(link.latency_s)} a fetch{hidden}; "
        f"quality floor {settings.handoff.quality_floor}\n"
    )


def _ends(transport: str, ends: Ends) -> Text:
    def each(work: Speed) -> str:
        return f"{_ms(work.block_s)} a fetch and {1e9 / work.bytes_per_s:.2f} ns a byte"

    moving = f"with sending ({each(ends.send)}) and fetching ({each(ends.fetch)})"
    if transport != "tcp":
        moving = f"without moving bytes: what that takes them over {transport}, workers see when they do it"
    return Text(f"an end: all work of the busier end over its {ends.sender_cores:g} cores, {moving}")


def _layout(settings: Config) -> KVLayout:
    import torch

    from baton.layout import KVLayout
    from engine.hub import resolve
    from engine.spec import ModelSpec
    from engine.weights import choose_dtype

    spec = ModelSpec.from_folder(resolve(settings.model.id, settings.model.cache_dir))
    dtype = choose_dtype(settings.model.dtype, torch.device("cpu"))
    return KVLayout("", spec.layers, spec.kv_heads, spec.head_dim, dtype)


def _measured(settings: Config) -> Link:
    """Between two processes on this machine, over the configured transport."""
    from kvtransfer.chooser import Link
    from placement.measure_handoff import measure_wire

    speed = measure_wire(settings.handoff.transport, settings.handoff.ucx_tls)
    return Link(speed.bytes_per_s, speed.layer_s)


def bytes_per_s(field: str, text: str) -> float:
    """``1Gbit``, ``100 Mbit/s``, ``2.5GB``, ``2.5 GB/s``: a small b alone is a bit, as in Gb/s."""
    found = _BANDWIDTH.fullmatch(text.strip())
    if found is None or not 0 < (number := _number(found[1])) < math.inf:
        raise InvalidRequest(field, f"is {text!r}; expected a rate like 1Gbit, 10Gb/s or 2.5GB/s")
    return number * _SCALE[found[2].lower()] / (1 if found[3] == "B" else 8)


def seconds(field: str, text: str) -> float:
    """``50us``, ``2ms``, ``0.5s``."""
    found = _DURATION.fullmatch(text.strip())
    if found is None or not 0 <= (number := _number(found[1])) < math.inf:
        raise InvalidRequest(field, f"is {text!r}; expected a time like 50us, 2ms or 0.5s")
    return number * _SECONDS[found[2].lower()]


def _number(text: str) -> float:
    """-1 for what is no number."""
    try:
        return float(text)
    except ValueError:
        return -1.0


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.3f} ms" if ms < 1 else f"{ms:.1f} ms" if ms < 100 else f"{ms:,.0f} ms"


def _rate(bytes_per_s: float) -> str:
    gbit = bytes_per_s * 8 / 1e9
    return f"{gbit:.3g} Gbit/s" if gbit >= 1 else f"{gbit * 1e3:.3g} Mbit/s"


def _edge(bytes_per_s: float) -> str:
    return "never" if bytes_per_s == 0 else "always" if math.isinf(bytes_per_s) else _rate(bytes_per_s)
