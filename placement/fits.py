"""Published linear fits of OPT on A100 80 GB (DistServe, OSDI'24) as a cost model.

With n_i the tokens of prompt i, c_j the context of decode j and B decodes in the batch, in milliseconds:

    T_prefill = a + b sum(n_i) + c sum(n_i^2)         T_decode = a' + b' sum(c_j) + c' B

The decode coefficients have two regimes: below a threshold of B and from it on. A pipeline of pp stages passes a step
on every T/pp. Two cases lie outside what was fitted, and follow from the form: a chunk of ``count`` tokens after
``start`` adds b count + c ((start + count)^2 - start^2), so that chunks sum to their prompt; a mixed step reads the
weights once, so the smaller of the two constants is not paid.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import ConfigError
from placement.handoff_cost import HandoffCost

CAPACITY_FILE = "max_num_tokens.csv"

Coefficients = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class OptFit:
    """One model at one tensor and pipeline degree. Without ``handoff`` a transfer takes no time."""

    model: str
    tp: int
    pp: int
    prefill_ms: Coefficients
    small_batch_ms: Coefficients
    large_batch_ms: Coefficients
    large_from: int
    capacity_tokens: int
    handoff: HandoffCost | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: str = "facebook/opt-13b",
        tp: int = 1,
        pp: int = 1,
        handoff: HandoffCost | None = None,
    ) -> OptFit:
        """From a ``profiler-*.json`` with :data:`CAPACITY_FILE` beside it. Raises :class:`ConfigError`."""
        fit = _entry(_tree(Path(path)), model, str(tp), path)
        return cls(
            model=model,
            tp=tp,
            pp=pp,
            prefill_ms=_coefficients(fit, "prefill"),
            small_batch_ms=_coefficients(fit, "decoding_smallbs"),
            large_batch_ms=_coefficients(fit, "decoding_largebs"),
            large_from=int(fit["decoding_large_small_bs_threshold"]),
            capacity_tokens=_capacity(Path(path).with_name(CAPACITY_FILE), model, tp, pp),
            handoff=handoff,
        )

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    def sum_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_sum: int) -> float:
        """Through all pipeline stages."""
        if not chunks:
            return self.decode_step_s(batch, context_sum)
        base, per_token, per_square = self.prefill_ms
        prefill_ms = base
        for start, count in chunks:
            prefill_ms += per_token * count + per_square * count * (2 * start + count)
        if not batch:
            return prefill_ms / 1e3
        decode_ms = 1e3 * self.decode_step_s(batch, context_sum)
        return (prefill_ms + decode_ms - min(base, self._regime(batch)[0])) / 1e3

    def decode_step_s(self, batch: int, context_sum: int) -> float:
        if not batch:
            return 0.0
        base, per_context, per_sequence = self._regime(batch)
        return (base + per_context * context_sum + per_sequence * batch) / 1e3

    def transfer_s(self, tokens: int) -> float:
        return self.handoff.serial_s(tokens) if self.handoff else 0.0

    def exposed_transfer_s(self, tokens: int) -> float:
        if self.handoff is None or tokens <= 0:
            return 0.0
        return self.handoff.exposed_s(tokens, self.sum_s(((0, tokens),), 0, 0))

    def kv_tokens(self) -> int:
        return self.capacity_tokens

    def _regime(self, batch: int) -> Coefficients:
        return self.small_batch_ms if batch < self.large_from else self.large_batch_ms


def _tree(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the fits in {path}: {error}", field="fits") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} is not a JSON object", field="fits")
    return tree


def _entry(tree: dict[str, Any], model: str, tp: str, path: str | Path) -> dict[str, Any]:
    if model not in tree:
        raise ConfigError(f"{path} has no {model!r}; it has {', '.join(sorted(tree))}", field="fits.model")
    degrees: dict[str, dict[str, Any]] = tree[model]
    if tp not in degrees:
        raise ConfigError(f"{model} was fitted at tensor degrees {', '.join(sorted(degrees))}", field="fits.tp")
    return degrees[tp]


def _coefficients(fit: dict[str, Any], key: str) -> Coefficients:
    values = fit.get(key)
    if not isinstance(values, list) or len(values) != 3:
        raise ConfigError(f"is {values!r}, expected three coefficients", field=f"fits.{key}")
    base, first, second = (float(value) for value in values)
    return base, first, second


def _capacity(path: Path, model: str, tp: int, pp: int) -> int:
    wanted = (model, str(tp), str(pp))
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if (row["model"], row["tp"], row["pp"]) == wanted:
                    return int(row["max_num_tokens"])
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"cannot read the KV capacities in {path}: {error!r}", field="fits") from None
    raise ConfigError(f"{path} has no capacity of {model} at tp={tp}, pp={pp}", field="fits.pp")
