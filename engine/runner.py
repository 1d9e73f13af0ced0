"""One step on one rank: from token ids and block tables to logits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.attention import Span
from engine.cache import KVCache
from engine.model import Batch, Model

if TYPE_CHECKING:
    from engine.graphs import DecodeGraphs

log = logging.getLogger(__name__)


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
        self._graphs: DecodeGraphs | None = None

    def warm_up_steps(self) -> list[Step]:
        """Steps that compile every kernel a later one can need, on CUDA: a prompt, and decodes of some contexts.

        They use page 0 alone; whoever gets it writes it before reading it.
        """
        from engine.cuda_ops import CudaOps  # Triton, which only CUDA needs

        ops, page_tokens, room = self._model.ops, self._cache.page_tokens, self._cache.layers[0].shape[0]
        assert isinstance(ops, CudaOps), "nothing else compiles kernels as it goes"
        contexts = ops.contexts_to_compile(self._model.kv_heads, min(self._model.max_context, room))
        decodes = [Span(context - 1, 1, (0,) * -(-context // page_tokens)) for context in contexts]
        return [Step((0,), (0,), (Span(0, 1, (0,)),), 0), *(Step((0,), (0,), (span,), 1) for span in decodes)]

    def capture(self, largest: int) -> None:
        """From then on a step of at most ``largest`` decodes and nothing else is one launch, on CUDA."""
        from engine.graphs import DecodeGraphs  # Triton, which only CUDA needs

        graphs = DecodeGraphs(self._model, self._cache, largest)
        graphs.capture(lambda done, total: log.info("captured %d of %d CUDA graphs", done, total))
        self._graphs = graphs

    def run(self, step: Step, layer_written: Callable[[int], None] | None = None) -> torch.Tensor:
        """Logits [wanted rows, vocab] on rank 0; the step's KV is in the pages afterwards."""
        model = self._model
        self._cache.copy_pages(step.copied, step.copies)
        if self._graphs is not None and layer_written is None:
            logits = self._graphs.forward(step)
            if logits is not None:
                return logits
        decodes, chunks = step.spans[: step.decodes], step.spans[step.decodes :]
        positions = [position for span in step.spans for position in range(span.start, span.start + span.count)]
        attention = model.ops.plan(decodes, chunks, self._cache.page_tokens)
        # One copy, which the host does not wait for where memory can be pinned.
        indexes = torch.tensor(
            (*step.tokens, *positions, *step.wanted), dtype=torch.int64, pin_memory=model.device.type == "cuda"
        )
        indexes = indexes.to(model.device, non_blocking=True)
        tokens, places, wanted = torch.split(indexes, [len(step.tokens), len(positions), len(step.wanted)])
        logits = model.forward(Batch(tokens, places, wanted, attention), self._cache, layer_written)
        model.comm.settle()
        return logits
