"""Readers of recorded requests. Bytes of a file are someone else's: every bad line is named.

.csv    Azure LLM inference traces (TIMESTAMP,ContextTokens,GeneratedTokens)
.jsonl  Mooncake (timestamp in ms, input_length, output_length, hash_ids of 512-token blocks)
        or our own records (arrived_s, prompt_tokens, output_tokens), told apart by their keys
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from baton.errors import ConfigError
from placement.workload import Arrival, Workload

MOONCAKE_BLOCK_TOKENS = 512
MAX_TOKENS = 1 << 24  # a longer sequence is a broken line


def load(path: str | Path) -> Workload:
    """The trace in ``path``, by its suffix. Raises :class:`ConfigError` that names the line."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            match path.suffix:
                case ".csv":
                    return _sorted(path, _azure(path, file), 0)
                case ".jsonl":
                    return _json_lines(path, file)
                case other:
                    raise ConfigError(
                        f"{path} ends in {other!r}; a workload is a .csv or .jsonl file", field="workload"
                    )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", field="workload") from None


def record(arrival: Arrival) -> str:
    """One line of our own format."""
    return json.dumps(
        {"arrived_s": arrival.at_s, "prompt_tokens": arrival.prompt_tokens, "output_tokens": arrival.output_tokens}
    )


def _sorted(path: Path, arrivals: Iterable[Arrival], block_tokens: int) -> Workload:
    ordered = sorted(arrivals, key=lambda a: a.at_s)
    if not ordered:
        raise ConfigError(f"{path} holds no requests", field="workload")
    return Workload(path.stem, tuple(ordered), block_tokens).of(ordered)


def _azure(path: Path, lines: Iterable[str]) -> Iterator[Arrival]:
    rows = csv.DictReader(lines)
    if rows.fieldnames is None or not {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= set(rows.fieldnames):
        raise ConfigError(f"{path} lacks TIMESTAMP, ContextTokens, GeneratedTokens in its first line", field="workload")
    for number, row in enumerate(rows, start=2):
        yield _arrival(path, number, row, _azure_seconds, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))


def _azure_seconds(text: Any) -> float:
    """Seconds since 1970 of a timestamp with up to seven decimals, of which datetime reads six."""
    whole, _, fraction = str(text).partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")


def _json_lines(path: Path, lines: Iterable[str]) -> Workload:
    arrivals, block_tokens = [], 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _bad(path, number, error) from None
        if not isinstance(row, dict):
            raise _bad(path, number, "not an object")
        if "hash_ids" in row:
            block_tokens = MOONCAKE_BLOCK_TOKENS
            arrivals.append(_arrival(path, number, row, _milliseconds, ("timestamp", "input_length", "output_length")))
        else:
            arrivals.append(_arrival(path, number, row, float, ("arrived_s", "prompt_tokens", "output_tokens")))
    return _sorted(path, arrivals, block_tokens)


def _milliseconds(value: Any) -> float:
    return float(value) / 1e3


def _arrival(
    path: Path, number: int, row: Mapping[str, Any], seconds: Callable[[Any], float], keys: tuple[str, str, str]
) -> Arrival:
    try:
        at_s, prompt, output = seconds(row[keys[0]]), int(row[keys[1]]), int(row[keys[2]])
        blocks = tuple(int(block) for block in row.get("hash_ids", ()))
    except (KeyError, ValueError, TypeError) as error:
        raise _bad(path, number, repr(error)) from None
    if not (math.isfinite(at_s) and 0 <= prompt <= MAX_TOKENS and 0 <= output <= MAX_TOKENS):
        raise _bad(path, number, f"time {at_s}, {prompt} and {output} tokens")
    return Arrival(at_s, max(1, prompt), max(1, output), blocks)


def _bad(path: Path, number: int, what: object) -> ConfigError:
    return ConfigError(f"{path}, line {number}: {what}", field="workload")
