"""What a step costs: the one question the simulator and the search ask, whatever answers it.

Three kinds of model answer: :mod:`placement.roofline` (hardware numbers and, where there are any, measured kernel
tables), :mod:`placement.profile` (this engine, measured on this machine) and :mod:`placement.fits` (published linear
fits of OPT on A100). All are pure: a shape in, seconds out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StepShape:
    """One engine step on one worker: prefill chunks and decodes that run together."""

    chunks: tuple[tuple[int, int], ...]
    """Prefill chunks as (start, count): ``count`` new tokens after ``start`` tokens whose KV is already there."""
    contexts: tuple[int, ...]
    """Context length of every decode in the batch: tokens that its one new query attends to."""


class CostModel(Protocol):
    """Costs of one replica of one configuration: model, hardware, tensor and pipeline degree are fixed inside."""

    @property
    def gpus(self) -> int:
        """Accelerators per replica: tensor degree times pipeline degree."""
        ...

    def step_s(self, step: StepShape) -> float:
        """Seconds of one whole step, host overhead included; 0 for an empty step."""
        ...

    def transfer_s(self, tokens: int) -> float:
        """Seconds to hand over one prompt's KV when nothing is overlapped: encode, wire and landing."""
        ...

    def exposed_transfer_s(self, tokens: int) -> float:
        """The part of :meth:`transfer_s` that prefill does not hide: what a request waits after its prefill."""
        ...

    def kv_tokens(self) -> int:
        """Tokens of KV that one replica holds beside weights and working memory."""
        ...


class SummedCostModel(CostModel, Protocol):
    """A cost model whose decode cost depends on a batch only through its size and the sum of its contexts.

    Then a run of identical decode steps needs no tuples: after k steps of a fixed batch the sum has grown by
    ``k * batch``. ``decode_step_s(b, c)`` equals ``step_s`` of any b contexts that sum to c.
    """

    def decode_step_s(self, batch: int, context_sum: int) -> float: ...
