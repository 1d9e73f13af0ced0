"""What admission makes of three times the load that can be served: `python -m bench.overload`.

One prefill and one decode worker, a core each, under the default configuration but for the class that is offered: its
objectives are `--ttft-ms` and `--tpot-ms`. Every rate is an open loop (Poisson). First the capacity: rates rise until
goodput no longer does, and the most goodput of any of them is what the service can do. A closed loop only says where to
begin: its few clients leave the machine idle at times. Then multiples of the capacity. Prompts are random ids, so that
no cache helps.

admitted: not refused at once; whoever is shed later was admitted and missed. goodput: requests per second that met both
objectives, of all that came in that span. refusal_ms: from sending to the refusal, at the client, which shares the
cores with all the rest; front_refusal_ms: the same at HAProxy, from the call's first byte to the last of the answer;
client_lag_ms: how much later than due the client sent, which is what it had to wait for a core itself.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

import typer

from baton.config import Config
from baton.wire import inference_pb2 as pb
from bench import report, workload
from bench.front_log import FrontLog, Served
from bench.load import Ask, Target, run
from bench.stats import Record, Slo, distribution, percentile
from deploy import local

CLASS, FREE = "offered", "free"  # the class that is measured, and one without objectives
TOKENS = range(100, 40_000)  # ordinary tokens of SmolLM2
LATE = "SHED"  # the reason of those who were let in and sent away later
CLOSED = 8  # requests at once, while the first rate is looked for
CLOSED_S = 10.0
FIRST = 0.8  # of the closed loop's rate
RISE = 1.3  # from one rate to the next
FLAT = 2  # rates in a row whose goodput is no more than before: the end of the rise
MOST_RATES = 8
TIMEOUT_S = 60.0
PROMISED = 0.9  # share of admitted requests that shall be in time, and of peak goodput that shall remain
REFUSED_MS = 20.0

app = typer.Typer(pretty_exceptions_enable=False)


def _request(prompt: workload.Lengths, output: int, slo_class: str, rng: random.Random) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=rng.choices(TOKENS, k=prompt.draw(rng))),
        sampling=pb.Sampling(temperature=0.0, max_tokens=output, ignore_eos=True),
        slo_class=slo_class,
    )


async def closed(target: Target, prompt: workload.Lengths, output: int, seconds: float) -> float:
    """Requests per second when ``CLOSED`` are always under way, over the second half of ``seconds``."""
    rng, ends = random.Random(1), list[float]()
    start_s = time.perf_counter()

    async def client(number: int) -> None:
        while time.perf_counter() - start_s < seconds:
            async for _ in target.stub(number).Generate(_request(prompt, output, FREE, rng), timeout=TIMEOUT_S):
                pass
            ends.append(time.perf_counter() - start_s)

    await asyncio.gather(*(client(number) for number in range(CLOSED)))
    counted = [end_s for end_s in ends if seconds / 2 <= end_s <= seconds]
    return len(counted) / (seconds / 2)


async def offered(
    target: Target, rate_per_s: float, seconds: float, prompt: workload.Lengths, output: int
) -> list[Record]:
    """What became of every request of an open loop at that rate."""
    rng = random.Random(round(1000 * rate_per_s))
    times = workload.poisson(rate_per_s, max(1, round(rate_per_s * seconds)), rng)
    asks = []
    for at_s in times:
        request = _request(prompt, output, CLASS, rng)
        asks.append(Ask(workload.Planned(at_s, len(request.token_ids.ids), output), request))
    stop = asyncio.Event()
    return await run(target, asks, timeout_s=TIMEOUT_S, stop=stop, progress=lambda sent, ended: None)


async def sweep(measured: Callable[[float], Awaitable[dict[str, Any]]], first_per_s: float) -> list[dict[str, Any]]:
    """Rows of rising rates, from ``first_per_s`` on, until goodput has not risen ``FLAT`` times in a row."""
    rows = list[dict[str, Any]]()
    peak, flat, rate_per_s = 0.0, 0, first_per_s
    while flat < FLAT and len(rows) < MOST_RATES:
        rows.append(await measured(rate_per_s))
        goodput = rows[-1]["goodput_per_s"]
        flat = 0 if goodput > peak else flat + 1
        peak, rate_per_s = max(peak, goodput), RISE * rate_per_s
    return rows


def row(
    rate_per_s: float, share: float, records: Sequence[Record], served: Sequence[Served], slo: Slo
) -> dict[str, Any]:
    """The figures of one rate. served: the same requests as the front saw them.

    The front cannot tell who was refused from who was shed: as many of the slowest are left out as were shed.
    """
    refused = [one for one in records if one.status == "RESOURCE_EXHAUSTED" and one.reason != LATE]
    admitted = [one for one in records if one not in refused]
    met = [one for one in admitted if slo.met(one)]
    span_s = records[-1].due_s - records[0].due_s
    waits_ms = [1e3 * (one.ended_s - one.sent_s) for one in refused]
    shed = sum(one.reason == LATE for one in records)
    errors_ms = sorted(one.all_ms for one in served if one.refused)
    front_ms = errors_ms[: len(errors_ms) - shed]
    good = [one for one in admitted if one.ok]
    return {
        "share_of_capacity": share,
        "rate_per_s": rate_per_s,
        "requests": len(records),
        "admitted": len(admitted),
        "admitted_met_share": len(met) / len(admitted) if admitted else 0.0,
        "goodput_per_s": len(met) / span_s,
        "by_reason": dict(Counter(one.reason or one.status for one in records)),
        "ttft_ms": distribution([one.ttft_s for one in good]),
        "tpot_ms": distribution([one.tpot_s for one in good]),
        "refusal_ms": _percentiles(waits_ms),
        "front_refusal_ms": _percentiles(front_ms),
        "refused_within_20_ms": _within(waits_ms),
        "front_refused_within_20_ms": _within(front_ms),
        "client_lag_ms": _percentiles([1e3 * one.lag_s for one in records]),
    }


def _percentiles(waits_ms: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}": percentile(waits_ms, percent) for percent in (50, 90, 99, 100)} if waits_ms else {}


def _within(waits_ms: Sequence[float]) -> float:
    return sum(wait_ms <= REFUSED_MS for wait_ms in waits_ms) / len(waits_ms) if waits_ms else 1.0


async def measure(
    address: str,
    log: FrontLog,
    shares: Sequence[float],
    *,
    seconds: float,
    prompt: workload.Lengths,
    output: int,
    slo: Slo,
) -> dict[str, Any]:
    """The capacity, then every share of it in turn, the highest last."""
    async with Target(address, channels=2) as target:
        await target.connect(10.0)

        async def measured(rate_per_s: float, capacity_per_s: float) -> dict[str, Any]:
            records = await offered(target, rate_per_s, seconds, prompt, output)
            one = row(rate_per_s, rate_per_s / capacity_per_s, records, await log.calls(), slo)
            _tell(one)
            return one

        guess = await closed(target, prompt, output, CLOSED_S)
        await log.calls()
        print(f"closed loop {guess:.2f} requests/s; looking for the most goodput", flush=True)
        rising = await sweep(lambda rate_per_s: measured(rate_per_s, guess), FIRST * guess)
        reached = max(one["goodput_per_s"] for one in rising)
        print(f"capacity {reached:.2f} requests/s", flush=True)
        rising = [one | {"share_of_capacity": one["rate_per_s"] / reached} for one in rising]
        rows = [await measured(share * reached, reached) for share in sorted(shares)]
    peak = max(one["goodput_per_s"] for one in (*rising, *rows))
    last = rows[-1]
    verdict = {
        "admitted_met_share": last["admitted_met_share"],
        "goodput_of_peak": last["goodput_per_s"] / peak if peak else 0.0,
        "refused_within_20_ms": last["refused_within_20_ms"],
        "front_refused_within_20_ms": last["front_refused_within_20_ms"],
    }
    met = all(verdict[name] >= PROMISED for name in ("admitted_met_share", "goodput_of_peak"))
    refusal_p99_ms = last["refusal_ms"].get("p99", 0.0)
    return {
        "capacity_per_s": reached,
        "closed_loop_per_s": guess,
        "rising": rising,
        "rows": rows,
        "at_most_load": verdict
        | {"refusal_p99_ms": refusal_p99_ms, "front_refusal_p99_ms": last["front_refusal_ms"].get("p99", 0.0)},
        "met": met and refusal_p99_ms <= REFUSED_MS,
    }


def _tell(one: dict[str, Any]) -> None:
    ttft = one["ttft_ms"].get("p90", 0.0)
    refusals = ", ".join(
        f"{where} p50 {ms['p50']:.1f} p99 {ms['p99']:.1f} most {ms['p100']:.1f} ms"
        for where, ms in (
            ("client", one["refusal_ms"]),
            ("front", one["front_refusal_ms"]),
            ("the client's lag", one["client_lag_ms"]),
        )
        if ms
    )
    print(
        f"{one['share_of_capacity']:4.1f}x {one['rate_per_s']:5.2f}/s: {one['admitted']}/{one['requests']} admitted, "
        f"{one['admitted_met_share']:.1%} of them in time, goodput {one['goodput_per_s']:.2f}/s, "
        f"TTFT p90 {ttft:.0f} ms, refusals: {refusals}; {one['by_reason']}",
        flush=True,
    )


@app.command()
def main(
    *,
    shares: Annotated[str, typer.Option(help="Of the capacity, with commas.")] = "1.5,3",
    seconds: Annotated[float, typer.Option(help="Of every rate.")] = 20.0,
    prompt: Annotated[str, typer.Option(help="Tokens: 64 or uniform:32:128.")] = "uniform:32:128",
    output: Annotated[int, typer.Option(help="Tokens.")] = 16,
    ttft_ms: Annotated[float, typer.Option(help="Objective for the first token.")] = 2000.0,
    tpot_ms: Annotated[float, typer.Option(help="Objective per later token.")] = 200.0,
) -> None:
    config = Config().with_flags(
        {
            "name": "overload",
            "prefill.threads": 1,
            "decode.threads": 1,
            "prefill.pin": True,
            "decode.pin": True,
            "admission.classes": {CLASS: {"ttft_ms": ttft_ms, "tpot_ms": tpot_ms}, FREE: {}},
            "admission.default_class": FREE,
        }
    )
    lengths = workload.lengths(prompt)
    with FrontLog() as log:
        os.environ.update(log.environment)
        endpoints = local.up(config, progress=lambda line: None)
        try:
            slo = Slo(ttft_ms / 1e3, tpot_ms / 1e3)
            rates = [float(share) for share in shares.split(",")]
            result = asyncio.run(
                measure(endpoints.grpc, log, rates, seconds=seconds, prompt=lengths, output=output, slo=slo)
            )
        finally:
            local.down(config.name, progress=lambda line: None)
    print(result["at_most_load"], "met" if result["met"] else "NOT met")
    report.save("overload", result)


if __name__ == "__main__":
    app()
