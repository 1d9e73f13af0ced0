"""What a step costs: the one question the simulator and the search ask, whatever answers it.

Three kinds of model answer: :mod:`placement.roofline` (hardware numbers and, where there are any, measured kernel
tables), :mod:`placement.profile` (this engine, measured on this machine) and :mod:`placement.fits` (published linear
fits of OPT on A100). All are pure: a shape in, seconds out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast


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


StepTimes = Callable[[tuple[int, ...], float, int, float], list[float]]
"""(contexts of a batch, start, n, slowdown) -> when each of the next n decode steps of that batch ends."""


def step_times(cost: CostModel) -> StepTimes:
    """Asks the cost model for every step; through the sum of the contexts where the model allows it."""
    if hasattr(cost, "decode_step_s"):
        decode_step_s = cast(SummedCostModel, cost).decode_step_s

        def by_sum(contexts: tuple[int, ...], now_s: float, steps: int, slowdown: float) -> list[float]:
            batch, context_sum, ends_s = len(contexts), sum(contexts), []
            for _ in range(steps):
                now_s += slowdown * decode_step_s(batch, context_sum)
                context_sum += batch
                ends_s.append(now_s)
            return ends_s

        return by_sum

    def by_contexts(contexts: tuple[int, ...], now_s: float, steps: int, slowdown: float) -> list[float]:
        ends_s = []
        for step in range(steps):
            now_s += slowdown * cost.step_s(StepShape((), tuple(context + step for context in contexts)))
            ends_s.append(now_s)
        return ends_s

    return by_contexts
