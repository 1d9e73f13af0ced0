"""What is asked and when: arrival times, prompt and output lengths, prompts. Pure: randomness comes in."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class Planned:
    """One request of the open loop: when it is due, counted from the start, and its size in tokens."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Fixed:
    tokens: int

    def draw(self, rng: random.Random) -> int:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Uniform:
    low: int
    high: int  # inclusive

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


Lengths = Fixed | Uniform


def lengths(text: str) -> Lengths:
    """``512`` or ``uniform:64:1024``. Raises ValueError that says what is allowed."""
    match text.split(":"):
        case [tokens] if tokens.isdecimal() and int(tokens) >= 1:
            return Fixed(int(tokens))
        case ["uniform", low, high] if low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high):
            return Uniform(int(low), int(high))
        case _:
            raise ValueError(f"{text!r} is neither a count such as 512 nor a range such as uniform:64:1024")


def poisson(rate_per_s: float, count: int, rng: random.Random) -> list[float]:
    """``count`` arrival times in seconds of a Poisson process, ascending."""
    times, now_s = [], 0.0
    for _ in range(count):
        now_s += rng.expovariate(rate_per_s)
        times.append(now_s)
    return times


def read_trace(path: Path) -> list[Planned]:
    """A CSV in the form of the Azure 2023 LLM traces, by time, starting at 0. Raises ValueError that names the line."""
    with path.open(newline="", encoding="utf-8") as file:
        return parse_trace(file, str(path))


def parse_trace(lines: Iterable[str], source: str) -> list[Planned]:
    """See :func:`read_trace`."""
    reader = csv.DictReader(lines)
    if missing := [name for name in TRACE_COLUMNS if name not in (reader.fieldnames or ())]:
        raise ValueError(f"{source}: no column {', '.join(missing)}; needed are {', '.join(TRACE_COLUMNS)}")
    stamped = []
    for row in reader:
        try:
            stamped.append((timestamp(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"])))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}, line {reader.line_num}: {error}") from None
    stamped.sort(key=lambda row: row[0])
    return [Planned(at - stamped[0][0], prompt, output) for at, prompt, output in stamped]


def timestamp(text: str) -> float:
    """Seconds since the epoch of ``2023-11-16 18:15:46.6805900``, in UTC; datetime itself stops at six decimals."""
    whole, _, fraction = text.strip().partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")


def at_rate(trace: Sequence[Planned], rate_per_s: float) -> list[Planned]:
    """The trace with its times stretched evenly so that its mean rate is ``rate_per_s``; bursts keep their shape."""
    span_s = trace[-1].at_s - trace[0].at_s
    if span_s <= 0.0:
        raise ValueError("a trace needs at least two different times to be stretched")
    factor = (len(trace) - 1) / rate_per_s / span_s
    return [Planned(one.at_s * factor, one.prompt_tokens, one.output_tokens) for one in trace]


def clip(planned: Planned, context_tokens: int, max_output_tokens: int) -> Planned:
    """``planned`` cut to what fits: output first (at least 1, at most its limit), then the prompt into what is left."""
    output = max(1, min(planned.output_tokens, max_output_tokens, context_tokens - 1))
    prompt = max(1, min(planned.prompt_tokens, context_tokens - output))
    return Planned(planned.at_s, prompt, output)


def prompt_ids(index: int, tokens: int, allowed: Sequence[int], rng: random.Random) -> list[int]:
    """Random ids out of ``allowed``; the first one differs for neighbours, so that no prefix cache can help."""
    return [allowed[index % len(allowed)], *rng.choices(allowed, k=tokens - 1)]
