"""What the ranks of one tensor-parallel replica say to each other inside a step (Megatron-LM, arXiv:1909.08053)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Comm(Protocol):
    """Every rank calls the same methods in the same order with tensors of the same shape, empty ones included."""

    @property
    def rank(self) -> int: ...

    @property
    def ranks(self) -> int: ...

    def all_reduce(self, part: Tensor) -> Tensor:
        """The sum of all ranks' ``part`` [rows, width]; may reuse its memory."""

    def all_gather(self, part: Tensor) -> Tensor:
        """All ranks' ``part`` [rows, width] side by side in the order of ranks: [rows, ranks * width]."""


class Alone:
    """The only rank: what it has is already the whole."""

    rank = 0
    ranks = 1

    def all_reduce(self, part: Tensor) -> Tensor:
        return part

    def all_gather(self, part: Tensor) -> Tensor:
        return part
