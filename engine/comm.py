"""What the ranks of one tensor-parallel replica say to each other inside a step (Megatron-LM, arXiv:1909.08053)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from baton.errors import Unavailable


class RankLost(Unavailable):
    """A rank died, or did not reach the same point of the step in time. The replica is of no more use.

    ``rank`` is None where only the loss is known: a sum over a network does not say who was missing.
    """

    def __init__(self, rank: int | None, reason: str) -> None:
        super().__init__(f"{'a rank' if rank is None else f'rank {rank}'} is lost: {reason}")
        self.rank = rank


class Comm(Protocol):
    """Every rank calls the same methods in the same order with tensors of the same shape, empty ones included."""

    @property
    def rank(self) -> int: ...

    @property
    def ranks(self) -> int: ...

    @property
    def device(self) -> torch.device:
        """What this rank computes on."""

    def all_reduce(self, part: Tensor) -> Tensor:
        """The sum of all ranks' ``part`` [rows, width]; may reuse its memory."""

    def gather(self, part: Tensor) -> Tensor:
        """On rank 0, all ranks' ``part`` [rows, width] side by side in the order of ranks: [rows, ranks * width].

        The others, which sample nothing, get their own ``part`` back.
        """

    def settle(self) -> None:
        """Returns when this rank's device has done all that was asked of it so far; :class:`RankLost` if not in time.

        At the end of a step, for sums that only begin when they are called. Nothing to do where they return when done.
        """


class Alone:
    """The only rank: what it has is already the whole."""

    rank = 0
    ranks = 1

    def __init__(self, device: torch.device | None = None) -> None:
        """``device``: the CPU if not given."""
        self.device = device or torch.device("cpu")

    def all_reduce(self, part: Tensor) -> Tensor:
        return part

    def gather(self, part: Tensor) -> Tensor:
        return part

    def settle(self) -> None:
        return
