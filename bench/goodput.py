"""Open-loop load on a gRPC endpoint: latencies, attainment and goodput, with the machine they were measured on.

    python -m bench.goodput --rate 2 --requests 100 --prompt 256 --output 64
    python -m bench.goodput --sweep 0.5,1,2,4 --requests 200 --prompt uniform:64:512 --output 32
    python -m bench.goodput --trace azure_2023_conv.csv --rate 1 --requests 300

With --trace, sizes come from the CSV and so do arrival times, stretched to --rate or --sweep where given; --arrivals
poisson takes only the sizes from it. Prompts are random token ids without common prefixes, outputs have a fixed length
(ignore_eos). Definitions of the measures: bench/stats.py. Ctrl-C ends early and keeps what was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from baton.errors import BatonError
from baton.wire import inference_pb2 as pb
from bench import machine, workload
from bench.host import Host
from bench.load import CUT_OFF, Ask, Target, run
from bench.picture import Run, draw
from bench.stats import Record, Slo, attainment, goodput, summary

RESULTS = Path(__file__).parent / "results"
CONNECT_S = 10.0
IDLE_S = 60.0
IDLE_POLL_S = 0.25
LAG_WARNING_MS = 20.0


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--address", default="127.0.0.1:9000", help="host:port of the gRPC endpoint (%(default)s)")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--rate", type=_positive, help="requests per second")
    rates.add_argument("--sweep", type=_rates, help="rates to run one after the other, such as 0.5,1,2")
    add("--arrivals", choices=("poisson", "trace"), help="default: trace if there is one, else poisson")
    add("--trace", type=Path, help=f"CSV with columns {', '.join(workload.TRACE_COLUMNS)}")
    add("--requests", type=_count, default=100, help="measured requests per rate (%(default)s)")
    add("--warmup", type=_count_or_none, default=5, help="first requests of each rate, not counted (%(default)s)")
    add("--prompt", type=_lengths, default="256", help="tokens: 256 or uniform:64:512 (%(default)s)")
    add("--output", type=_lengths, default="64", help="tokens, as --prompt (%(default)s)")
    add("--max-output", type=_count, default=512, help="longer outputs of a trace are cut (%(default)s)")
    add("--ttft-ms", type=_positive, default=1000.0, help="objective for the first token (%(default)s)")
    add("--tpot-ms", type=_positive, default=100.0, help="objective per later token (%(default)s)")
    add("--codec", default="", help="codec of the handoff; default: the deployment's")
    add("--timeout", type=_positive, default=120.0, help="seconds until a request counts as failed (%(default)s)")
    add("--rest", type=_positive, default=5.0, help="seconds for reading the load at rest (%(default)s)")
    add("--channels", type=_count, default=4, help="gRPC connections (%(default)s)")
    add("--seed", type=int, default=0, help="of arrivals, sizes and prompts (%(default)s)")
    add("--label", default="", help="added to the names of the result files")
    add("--results", type=Path, default=RESULTS, help="folder of the result files (%(default)s)")
    chosen = parser.parse_args(argv)
    if chosen.arrivals == "trace" and chosen.trace is None:
        parser.error("--arrivals trace needs --trace")
    chosen.arrivals = chosen.arrivals or ("trace" if chosen.trace else "poisson")
    if chosen.rate is None and chosen.sweep is None and chosen.arrivals == "poisson":
        parser.error("poisson arrivals need --rate or --sweep")
    return chosen


def plan(chosen: argparse.Namespace, rate_per_s: float | None, context_tokens: int) -> list[workload.Planned]:
    """The requests of one rate, warm-up first; None keeps a trace's own times. Raises ValueError for a bad trace."""
    count, rng = chosen.warmup + chosen.requests, random.Random(chosen.seed)
    if chosen.trace is None:
        sizes = [workload.Planned(0.0, chosen.prompt.draw(rng), chosen.output.draw(rng)) for _ in range(count)]
    else:
        sizes = workload.read_trace(chosen.trace)[:count]
        if len(sizes) < count:
            raise ValueError(f"{chosen.trace} has {len(sizes)} requests, --warmup and --requests ask for {count}")
    if chosen.arrivals == "poisson" and rate_per_s is not None:
        times = workload.poisson(rate_per_s, count, rng)
        sizes = [
            workload.Planned(at_s, size.prompt_tokens, size.output_tokens)
            for at_s, size in zip(times, sizes, strict=True)
        ]
    elif rate_per_s is not None:
        sizes = workload.at_rate(sizes, rate_per_s)
    return [workload.clip(size, context_tokens, chosen.max_output) for size in sizes]


async def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Runs every rate and returns the result document. Raises grpc.RpcError, TimeoutError, ValueError."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    slo = Slo(chosen.ttft_ms / 1e3, chosen.tpot_ms / 1e3)
    runs: list[Run] = []
    async with Target(chosen.address, chosen.channels) as target:
        await target.connect(CONNECT_S)
        (model, *_) = (await target.stub(0).ListModels(pb.ListModelsRequest(), timeout=CONNECT_S)).models
        document = _preamble(chosen, await _status(target))
        with Host(chosen.address) as host:
            document |= await host.at_rest(target, model, chosen.rest)
            for number, rate_per_s in enumerate(chosen.sweep or [chosen.rate]):
                planned = plan(chosen, rate_per_s, model.max_context_tokens)
                mean_rate = rate_per_s or (len(planned) - 1) / max(planned[-1].at_s, 1e-9)
                asks = _asks(planned, model, chosen.codec, random.Random(f"{chosen.seed}/{number}"))
                host.begin()
                progress = _progress(mean_rate, asks)
                records = await run(target, asks, timeout_s=chosen.timeout, stop=stop, progress=progress)
                kept = [record for record in records if record.status != CUT_OFF and record.index >= chosen.warmup]
                document["runs"].append(_outcome(mean_rate, kept, slo) | host.read())
                runs.append(Run(mean_rate, kept))
                _tell(document["runs"][-1])
                if not stop.is_set() and not await _idle(target):
                    print(f"the service still holds requests after {IDLE_S:.0f} s; ending here", file=sys.stderr)
                    stop.set()
                if stop.is_set():
                    break
    reached = goodput([(run.rate_per_s, attainment(run.records, slo)) for run in runs])
    document |= {"partial": stop.is_set(), "goodput": asdict(reached)}
    _write(chosen, document, runs, slo)
    return document


def _asks(planned: Sequence[workload.Planned], model: pb.Model, codec: str, rng: random.Random) -> list[Ask]:
    """Built before the clock starts, so that building costs no request any time.

    ``rng``: another one for every rate, else prefix caches would know the later ones' prompts from the first.
    """
    ends = set(model.eos_token_ids)
    allowed = [token for token in range(model.vocab_size) if token not in ends]
    return [
        Ask(
            one,
            pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=workload.prompt_ids(index, one.prompt_tokens, allowed, rng)),
                sampling=pb.Sampling(temperature=0.0, max_tokens=one.output_tokens, ignore_eos=True),
                handoff=pb.Handoff(codec=codec),
            ),
        )
        for index, one in enumerate(planned)
    ]


async def _status(target: Target) -> pb.GetStatusResponse:
    answer: pb.GetStatusResponse = await target.stub(0).GetStatus(pb.GetStatusRequest(), timeout=CONNECT_S)
    return answer


async def _idle(target: Target) -> bool:
    """True once the router holds nothing, so that one rate's backlog does not burden the next; False after a while."""
    deadline_s = time.monotonic() + IDLE_S
    while time.monotonic() < deadline_s:
        if (await _status(target)).router.inflight == 0:
            return True
        await asyncio.sleep(IDLE_POLL_S)
    return False


def _preamble(chosen: argparse.Namespace, status: pb.GetStatusResponse) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench.goodput", *sys.argv[1:]]),
        "machine": machine.describe(),
        "server": {
            "model": status.model,
            "transport": status.transport,
            "codec": status.codec,
            "pools": {pool.role: len(pool.workers) for pool in status.pools},
        },
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in _plain(chosen).items()},
        "runs": [],
    }


def _plain(chosen: argparse.Namespace) -> dict[str, Any]:
    fields = vars(chosen).items()
    return {
        name: asdict(value) if isinstance(value, workload.Fixed | workload.Uniform) else value for name, value in fields
    }


def _outcome(rate_per_s: float, records: list[Record], slo: Slo) -> dict[str, Any]:
    rows = [
        {
            "due_s": round(record.due_s, 6),
            "lag_s": round(record.lag_s, 6),
            "prompt_tokens": record.prompt_tokens,
            "output_tokens": record.output_tokens,
            "status": record.status,
            "message": record.message,
            "met": slo.met(record),
            "token_times_s": [round(at_s, 6) for at_s in record.token_times_s],
            "stages_s": {name: round(seconds, 6) for name, seconds in record.stages.items()},
            "transfer_busy_s": record.transfer_busy_s,
            "transfer_exposed_s": record.transfer_exposed_s,
            "transfer_bytes": record.transfer_bytes,
        }
        for record in records
    ]
    return {"rate_per_s": rate_per_s, "summary": summary(records, slo), "records": rows}


def _progress(rate_per_s: float, asks: Sequence[Ask]) -> Any:
    live = sys.stderr.isatty()
    last_s = 0.0

    def show(sent: int, ended: int) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s > (0.1 if live else 10.0) or ended == len(asks):
            last_s = now_s
            line = f"{rate_per_s:g} req/s: sent {sent} of {len(asks)}, ended {ended}, running {sent - ended}"
            print(f"\r{line}   " if live else line, end="" if live and ended < len(asks) else "\n", file=sys.stderr)

    return show


def _tell(outcome: dict[str, Any]) -> None:
    shown = outcome["summary"]
    print(
        f"{outcome['rate_per_s']:g} req/s: {shown['completed']}/{shown['requests']} completed, {shown['by_status']}; "
        f"{shown['attainment']:.1%} met the objective; {shown['output_tokens_per_s']:.1f} tokens/s"
    )
    for name in ("ttft", "tpot", "itl", "e2e"):
        values = shown[f"{name}_ms"]
        if values:
            print(f"  {name:>4} ms  " + "  ".join(f"{key} {value:9.1f}" for key, value in values.items()))
    lag = shown["client_lag_ms"]
    if lag and lag["p99"] > LAG_WARNING_MS:
        print(f"  this client fell behind by {lag['p99']:.0f} ms (p99); the figures include it", file=sys.stderr)


def _write(chosen: argparse.Namespace, document: dict[str, Any], runs: Sequence[Run], slo: Slo) -> None:
    stamp = document["date"].replace(":", "").replace("-", "").partition("+")[0]
    stem = "-".join(filter(None, ("goodput", stamp, chosen.label, "partial" if document["partial"] else "")))
    chosen.results.mkdir(parents=True, exist_ok=True)
    path = chosen.results / f"{stem}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    server = document["server"]
    title = (
        f"{server['model']}, {server['pools']}, {server['transport']}, {document['machine']['cpu']}, {document['date']}"
    )
    draw(runs, slo, title, path.with_suffix(".png"))
    reached = document["goodput"]
    more = "" if reached["bounded"] else " (no tried rate missed: a lower bound)"
    print(f"goodput {reached['rate_per_s']:g} req/s{more}\n{path}\n{path.with_suffix('.png')}")


def _positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _lengths(text: str) -> workload.Lengths:
    try:
        return workload.lengths(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _rates(text: str) -> list[float]:
    return [_positive(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    chosen = options(argv)
    try:
        document = asyncio.run(measure(chosen))
    except TimeoutError:
        print(f"error: {chosen.address} does not answer", file=sys.stderr)
        return 1
    except grpc.aio.AioRpcError as error:
        print(f"error: {chosen.address}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    except (OSError, ValueError, RuntimeError, BatonError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 130 if document["partial"] else 0


if __name__ == "__main__":
    sys.exit(main())
