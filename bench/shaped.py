"""Exposed handoff time on links of a given rate: every fixed codec, and the chooser under several quality floors.

Exposed is what a client waits for: from the first token, when prefill has pushed its last layer, until every block has
landed. Sender and receiver are two processes, each in a network namespace of its own.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from baton.config_handoff import AUTO, FLOORS, LOSS, HandoffConfig, codecs_within
from bench.ends import LandEnd, Push, SendEnd, Verdict
from bench.link import FAR, NEAR, Link, RawSink
from bench.prompt import Prompt
from bench.remote import Remote
from kvtransfer.handoff import Landed

BUDGET_S = 60.0
LOCAL = "127.0.0.1"
WARM_UP = 2  # handoffs after each change of the link: the sender's meter sees the new rate
RAW_SOCKET_BYTES = 200_000_000


@dataclass(frozen=True, slots=True)
class Way:
    """A codec, or the chooser under a floor."""

    codec: str
    floor: str

    @property
    def name(self) -> str:
        return f"{AUTO} ({self.floor})" if self.codec == AUTO else self.codec


def enter(arguments: Sequence[str]) -> int | None:
    """None when this process owns its network already; else the exit status of one that did the work there."""
    try:
        own = os.readlink("/proc/self/ns/net") != os.readlink(f"/proc/{os.getppid()}/ns/net")
    except PermissionError:  # the parent lives in the user namespace outside
        own = True
    if own:
        return None
    inner = ["unshare", "--net", "--map-root-user", sys.executable, "-m", "bench.handoff", *arguments]
    return subprocess.run(inner, check=False).returncode


def ways(codecs: Sequence[str], floors: Sequence[str]) -> list[Way]:
    fixed = [Way(codec, FLOORS[LOSS[codec]]) for codec in codecs]
    return fixed + [Way(AUTO, floor) for floor in floors]


def pushes(prompt: Prompt, speed: float) -> tuple[Push, ...]:
    """The prompt's layers as an engine ``speed`` times as fast as the measured one computes them."""
    return tuple(Push(push.due_s / speed, push.layer, push.start, push.count) for push in prompt.pushes)


class Bench:
    """A sender and a receiver, a core each; ``shaped``: in networks of their own with a link between. Use ``with``."""

    def __init__(self, prompt: Prompt, config: HandoffConfig, *, shaped: bool) -> None:
        self._prompt = prompt
        self._numbers = itertools.count()
        self._land, self._send = Remote(LandEnd, core=0), Remote(SendEnd, core=1, own_network=shaped)
        self._link = Link(self._send.pid) if shaped else None
        near, far = (NEAR, FAR) if shaped else (LOCAL, LOCAL)
        self._land.call("start", prompt.layout, config, worker_id="d0", generation="gd", tokens=4096, host=near)
        self._send.call("start", prompt.layout, config, worker_id="p0", generation="gp", tokens=4096, host=far)
        self._send.call("put", "prompt", prompt.tokens, prompt.path)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exc: object) -> None:
        self._land.end()
        self._send.end()

    def shape(self, gbit_per_s: float) -> float:
        """Limits the link; GB/s of one plain connection over it."""
        if self._link is None:
            raise RuntimeError("there is no link to shape")
        self._link.shape(gbit_per_s)
        sink = RawSink()
        self._send.call("blast", NEAR, sink.port, RAW_SOCKET_BYTES)
        return sink.result()

    def hand_over(self, way: Way, pushed: Sequence[Push], *, check: bool = False) -> tuple[float, Landed]:
        """Exposed seconds, and the outcome; RuntimeError for a handoff that did not land as it should."""
        prompt, request_id = self._prompt, f"r{next(self._numbers)}"
        ticket = self._land.call(
            "reserve", request_id, 1, tokens=prompt.tokens, codec=way.codec, floor=way.floor, budget_s=BUDGET_S
        )
        self._send.call("offer", ticket, "prompt", pushed, tokens=prompt.tokens, budget_s=BUDGET_S)
        landed, sent = self._land.call("ended", request_id), self._send.call("ended", request_id)
        if not isinstance(landed.outcome, Landed):
            raise RuntimeError(f"{way.name}: {landed.outcome}")
        if check and way.floor == "exact":
            verdict = self._land.call("verdict", request_id, prompt.tokens, prompt.path, "raw", pushed)
            if verdict != Verdict(prompt.tokens * prompt.layout.layers, 0, 0):
                raise RuntimeError(f"{way.name}: landed with {verdict}")
        self._land.call("release", request_id)
        self._land.call("free", request_id)
        return landed.at_s - sent.at_s, landed.outcome

    def measure(self, chosen: Sequence[Way], pushed: Sequence[Push], repeats: int) -> dict[str, Any]:
        """Medians by way. Ways take turns, so that a noisy machine disturbs them alike."""
        for way in (way for way in chosen if way.codec == AUTO):
            for _ in range(WARM_UP):
                self.hand_over(way, pushed)
        times: dict[str, list[float]] = {way.name: [] for way in chosen}
        outcomes: dict[str, Landed] = {}
        for repeat in range(repeats):
            for way in chosen:
                exposed_s, outcomes[way.name] = self.hand_over(way, pushed, check=repeat == 0)
                times[way.name].append(exposed_s)
        return {
            name: {
                "exposed_ms": 1e3 * statistics.median(some), "least_ms": 1e3 * min(some), "most_ms": 1e3 * max(some),
                "bytes": outcomes[name].bytes, "codecs": outcomes[name].codec_tokens,
            }
            for name, some in times.items()
        }  # fmt: skip


def judge(rows: dict[str, Any]) -> dict[str, Any]:
    """The chooser under each floor against the best fixed codec that the floor allows, and against raw."""
    verdicts = {}
    for name, row in rows.items():
        if not name.startswith(AUTO):
            continue
        floor = name[len(AUTO) + 2 : -1]
        allowed = [codec for codec in codecs_within(floor) if codec in rows]
        best = min(allowed, key=lambda codec: float(rows[codec]["exposed_ms"]))
        verdicts[floor] = {
            "best_fixed": best,
            "over_best": row["exposed_ms"] / rows[best]["exposed_ms"],
            "raw_over_chooser": rows["raw"]["exposed_ms"] / row["exposed_ms"],
            "raw_over_best": rows["raw"]["exposed_ms"] / rows[best]["exposed_ms"],
        }
    return verdicts


def break_even(points: Sequence[tuple[float, float, float]]) -> float | None:
    """Gb/s above which raw lands sooner than a codec; None when that is nowhere between the first and last points.

    ``points``: (Gb/s, raw seconds, codec seconds), rising. Interpolated on the logarithm of the rate.
    """
    for (low, raw_low, codec_low), (high, raw_high, codec_high) in itertools.pairwise(points):
        before, after = raw_low - codec_low, raw_high - codec_high
        if before > 0 >= after:
            return low * math.exp(math.log(high / low) * before / (before - after))
    return None


def draw(result: dict[str, Any], title: str, path: Path) -> None:
    """Exposed time against bandwidth: thin lines for fixed codecs, thick ones for the chooser."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    rates = [float(rate) for rate in result]
    for name in next(iter(result.values()))["ways"]:
        times = [row["ways"][name]["exposed_ms"] for row in result.values()]
        chosen = name.startswith(AUTO)
        axis.plot(rates, times, "o-" if chosen else ".--", linewidth=2.5 if chosen else 1, label=name)
    axis.set(
        xscale="log", yscale="log", xlabel="link (Gb/s)", ylabel="exposed handoff time (ms)", title=title,
        xticks=rates, xticklabels=[f"{rate:g}" for rate in rates],
    )  # fmt: skip
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=110)
