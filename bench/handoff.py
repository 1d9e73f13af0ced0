"""The handoff between real processes: on links of a given rate, against the transport's own rate, and under faults.

python -m bench.handoff shaped      time to land against bandwidth, every codec and the chooser
python -m bench.handoff unshaped    share of NIXL's and a raw socket's own rate; what prefill does not hide
python -m bench.handoff storm       handoffs among kills, stops, corrupt bytes, delays and aborts
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from baton.config_handoff import AUTO, CODECS, HandoffConfig
from bench import report
from bench import shaped as shaped_bench
from bench import unshaped as unshaped_bench
from bench.prompt import record
from bench.storm import Storm, summary

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
WAYS = {"tcp": ("tcp", ""), "nixl": ("nixl", ""), "nixl-tcp": ("nixl", "tcp")}


@app.command()
def shaped(  # noqa: PLR0917  options, each by its name
    gbits: Annotated[str, typer.Option(help="Rates of the link.")] = "1,5,10,25",
    transport: Annotated[str, typer.Option(help="tcp or nixl (over TCP).")] = "tcp",
    codecs: Annotated[str, typer.Option(help="Fixed codecs; empty: all.")] = "",
    floors: Annotated[str, typer.Option(help="Quality floors of the chooser.")] = "exact,int8,int4,int2",
    speed: Annotated[
        float, typer.Option(help="Pace of prefill, in times of this machine's; inf: all at once.")
    ] = math.inf,
    tokens: Annotated[int, typer.Option(help="Of the prompt.")] = 1900,
    repeats: Annotated[int, typer.Option(help="Handoffs of each way at each rate.")] = 5,
) -> None:
    """Exposed handoff time against bandwidth, of bfloat16 KV; needs root or user namespaces, and tc."""
    if (status := shaped_bench.enter(sys.argv[1:])) is not None:
        raise typer.Exit(status)
    config = HandoffConfig(transport=transport, ucx_tls="tcp" if transport == "nixl" else "", quality_floor="int2")  # type: ignore[arg-type]
    ways = shaped_bench.ways(codecs.split(",") if codecs else CODECS, floors.split(","))
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        prompt = record(tokens, "bfloat16", Path(folder))
        pushed = shaped_bench.pushes(prompt, speed)
        with shaped_bench.Bench(prompt, config, shaped=True) as bench:
            for gbit in map(float, gbits.split(",")):
                socket_gb_per_s = bench.shape(gbit)
                rows = bench.measure(ways, pushed, repeats)
                result[f"{gbit:g}"] = {
                    "ways": rows,
                    "judged": shaped_bench.judge(rows),
                    "socket_gb_per_s": socket_gb_per_s,
                }
                _print_rate(gbit, result[f"{gbit:g}"])
    evens = _break_evens(result)
    name = f"handoff-shaped-{transport}-{'at-once' if math.isinf(speed) else f'speed-{speed:g}'}"
    whole = {"raw_bytes": prompt.tokens * prompt.layout.token_bytes, "prefill_s": prompt.prefill_s, "speed": str(speed),
             "break_even_gbit_per_s": evens, "by_gbit_per_s": result}  # fmt: skip
    title = f"{tokens} tokens of SmolLM2-135M, {transport}, " + (
        "all layers at once" if math.isinf(speed) else f"prefill x {speed:g}"
    )
    shaped_bench.draw(result, title, report.save(name, whole).with_suffix(".png"))


def _print_rate(gbit: float, row: dict[str, Any]) -> None:
    print(f"--- {gbit:g} Gb/s; one plain socket {8 * row['socket_gb_per_s']:.2f} Gb/s")
    for name, one in row["ways"].items():
        print(f"{name:14} {one['exposed_ms']:8.1f} ms ({one['least_ms']:.1f} to {one['most_ms']:.1f}), "
              f"{one['bytes'] / 1e6:6.2f} MB {one['codecs'] if name.startswith(AUTO) else ''}")  # fmt: skip
    for floor, one in row["judged"].items():
        print(f"floor {floor:6} chooser {one['over_best']:.2f} x the best fixed ({one['best_fixed']}), "
              f"{one['raw_over_chooser']:.2f} x less than raw", flush=True)  # fmt: skip


def _break_evens(result: dict[str, Any]) -> dict[str, float | None]:
    """Gb/s above which raw lands sooner, by codec."""
    evens = {}
    for name in next(iter(result.values()))["ways"]:
        if name == "raw" or name.startswith(AUTO):
            continue
        evens[name] = shaped_bench.break_even(
            [
                (float(rate), row["ways"]["raw"]["exposed_ms"], row["ways"][name]["exposed_ms"])
                for rate, row in result.items()
            ]
        )
        print(f"break-even of {name}: " + ("outside" if evens[name] is None else f"{evens[name]:.1f} Gb/s"))
    return evens


@app.command()
def unshaped(
    tokens: Annotated[int, typer.Option(help="Of the prompt whose rate is measured.")] = 1900,
    repeats: Annotated[int, typer.Option(help="Of each measurement.")] = 9,
) -> None:
    """Rates of raw KV, pages to pages, beside NIXL's own and a plain socket's."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        prompt = record(tokens, "bfloat16", Path(folder))
        own = {
            "nixl": unshaped_bench.nixl_rate(prompt, "", 16, repeats),
            "nixl-tcp": unshaped_bench.nixl_rate(prompt, "tcp", 16, repeats),
            "tcp": unshaped_bench.socket_rate(prompt, repeats),
        }
        for name, own_gb_per_s in own.items():
            row = {"own_gb_per_s": own_gb_per_s}
            row |= {codec: unshaped_bench.handoff_rate(prompt, *WAYS[name], codec, repeats) for codec in ("raw", AUTO)}
            result[name] = row | {"share": row["raw"] / own_gb_per_s}
            print(f"{name:9} own {own_gb_per_s:5.2f} GB/s, handoff of raw KV {row['raw']:5.2f} "
                  f"({result[name]['share']:.0%}), chooser {row[AUTO]:5.2f}", flush=True)  # fmt: skip
    report.save("handoff-unshaped", result)


@app.command()
def hidden(
    lengths: Annotated[str, typer.Option(help="Prompt tokens.")] = "512,1024,1900",
    codecs: Annotated[str, typer.Option(help="Codecs, or auto.")] = f"raw,lossless,{AUTO}",
    transport: Annotated[str, typer.Option(help="Of tcp, nixl and nixl-tcp.")] = "nixl",
    repeats: Annotated[int, typer.Option(help="Requests of each kind.")] = 3,
) -> None:
    """How much of a handoff prefill does not hide, with a real prefill and a real decode worker on a core each."""
    with unshaped_bench.Pair(*WAYS[transport]) as pair:
        result = asyncio.run(pair.split([int(length) for length in lengths.split(",")], codecs.split(","), repeats))
    for name, one in result.items():
        stages = ", ".join(f"{stage} {one[stage + '_ms']:.1f}" for stage in ("encode", "wire", "land"))
        print(f"{name:14} prefill {one['prefill_ms']:7.1f} ms ({one['prefill_alone_ms']:.1f} alone), "
              f"exposed ms: {stages}; {one['exposed_share']:.2%}")  # fmt: skip
    report.save(f"handoff-hidden-{transport}", result)


@app.command()
def storm(
    handoffs: Annotated[int, typer.Option(help="Handoffs on each transport.")] = 1000,
    seed: Annotated[int, typer.Option(help="What happens to whom and when.")] = 11,
    transports: Annotated[str, typer.Option(help="Of tcp, nixl and nixl-tcp (NIXL with UCX_TLS=tcp).")] = ",".join(
        WAYS
    ),
) -> None:
    """Exit status 1 when a promise was broken."""
    logging.basicConfig(level=logging.ERROR)
    broken = 0
    for name in transports.split(","):
        transport, ucx_tls = WAYS[name]
        begun_s = time.monotonic()
        seen = Storm(transport, seed, ucx_tls=ucx_tls).run(handoffs)
        print(*summary(seen), sep="\n", flush=True)
        report.save(f"handoff-storm-{name}", seen.tree() | {"seed": seed, "took_s": time.monotonic() - begun_s})
        broken += len(seen.wrong)
    raise typer.Exit(1 if broken else 0)


if __name__ == "__main__":
    app()
