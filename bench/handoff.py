"""The handoff between real processes: on links of a given rate, against the transport's own rate, and under faults.

python -m bench.handoff shaped      time to land against bandwidth, every codec and the chooser
python -m bench.handoff unshaped    share of NIXL's and a raw socket's own rate; what prefill does not hide
python -m bench.handoff storm       handoffs among kills, stops, corrupt bytes, delays and aborts
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Annotated

import typer

from bench import report
from bench.storm import Storm, summary

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
WAYS = {"tcp": ("tcp", ""), "nixl": ("nixl", ""), "nixl-tcp": ("nixl", "tcp")}


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
    results, broken = {}, 0
    for name in transports.split(","):
        transport, ucx_tls = WAYS[name]
        begun_s = time.monotonic()
        seen = Storm(transport, seed, ucx_tls=ucx_tls).run(handoffs)
        print(*summary(seen), sep="\n", flush=True)
        results[name] = asdict(seen) | {"took_s": time.monotonic() - begun_s}
        broken += len(seen.wrong)
    report.save("handoff-storm", results)
    raise typer.Exit(1 if broken else 0)


if __name__ == "__main__":
    app()
