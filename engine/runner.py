"""One step on one rank: from token ids and block tables to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.attention import Span
from engine.cache import KVCache
from engine.model import Batch, Model


@dataclass(frozen=True, slots=True)
class Step:
    """What every rank must know of a step; it crosses processes as a record."""

    tokens: tuple[int, ...]  # of all sequences, one after the other
    wanted: tuple[int, ...]  # indexes of the rows whose logits are needed
    spans: tuple[Span, ...]  # decodes first, longest context first
    decodes: int
    copied: tuple[int, ...] = ()  # pages to copy before anything is written,
    copies: tuple[int, ...] = ()  # and the pages to copy them to


class Runner:
    """One rank's model over its part of the KV cache."""

    def __init__(self, model: Model, cache: KVCache) -> None:
        self._model, self._cache = model, cache

    def run(self, step: Step, layer_written: Callable[[int], None] | None = None) -> torch.Tensor:
        """Logits [wanted rows, vocab] on rank 0; the step's KV is in the pages afterwards."""
        model = self._model
        self._cache.copy_pages(step.copied, step.copies)
        decodes, chunks = step.spans[: step.decodes], step.spans[step.decodes :]
        positions = [position for span in step.spans for position in range(span.start, span.start + span.count)]
        attention = model.ops.plan(decodes, chunks, self._cache.page_tokens)
        batch = Batch(self._indexes(step.tokens), self._indexes(positions), self._indexes(step.wanted), attention)
        return model.forward(batch, self._cache, layer_written)

    def _indexes(self, values: list[int] | tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._model.device)
