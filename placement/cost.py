"""What a step costs: the one question the simulator and the search ask, whatever answers it.

Three kinds of model answer: :mod:`placement.roofline` (hardware numbers and, where there are any, measured kernel
tables), :mod:`placement.profile` (this engine, measured on this machine) and :mod:`placement.fits` (published linear
fits of OPT on A100). All are pure: a shape in, seconds out.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """Costs of one replica of one configuration: model, hardware, tensor and pipeline degree are fixed inside.

    A batch of decodes costs what its size and the sum of its contexts say, whichever contexts these are: that is what
    paged decode attention reads. So a run of identical decode steps needs no contexts: after k steps of a fixed batch
    the sum has grown by ``k * batch``.
    """

    @property
    def gpus(self) -> int:
        """Accelerators per replica: tensor degree times pipeline degree."""
        ...

    def sum_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_sum: int) -> float:
        """Seconds of one whole step, host overhead included: ``chunks`` as in :class:`StepShape` and ``batch`` decodes,
        whose contexts sum to ``context_sum``; 0 for an empty step."""
        ...

    def decode_step_s(self, batch: int, context_sum: int) -> float:
        """:meth:`sum_s` without chunks."""
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


def step_s(cost: CostModel, step: StepShape) -> float:
    """Seconds of one step of this shape."""
    return cost.sum_s(step.chunks, len(step.contexts), sum(step.contexts))


def decode_ends(
    cost: CostModel, batch: int, context_sum: int, *, now_s: float, steps: int, slowdown: float
) -> list[float]:
    """When each of the next ``steps`` decode steps of one batch ends, the first of which begins at ``now_s``."""
    decode_step_s, ends_s = cost.decode_step_s, []
    for _ in range(steps):
        now_s += slowdown * decode_step_s(batch, context_sum)
        context_sum += batch
        ends_s.append(now_s)
    return ends_s
