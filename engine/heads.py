"""Whose KV heads are whose: rank ``r`` of ``n`` holds the ``r``-th of ``n`` equal runs of them, for every token.

A handoff always carries all heads in order. So a replica of one degree hands over to one of any other, and neither
knows the other's: the sender joins its ranks' parts, the receiver splits the whole for its own. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from baton.layout import KVLayout


def share_of(layout: KVLayout, ranks: int) -> KVLayout:
    """What each of ``ranks`` holds of a token that has ``layout``. Raises ValueError when heads are left over."""
    if layout.kv_heads % ranks:
        raise ValueError(f"{ranks} ranks cannot share {layout.kv_heads} KV heads evenly")
    return replace(layout, kv_heads=layout.kv_heads // ranks)


def split_heads(keys: Tensor, values: Tensor, ranks: int) -> list[Tensor]:
    """Each rank's rows of the cache, [tokens, 2 * kv_heads / ranks, head_dim] with its keys first.

    keys, values: [tokens, kv_heads, head_dim], all heads in order. Raises ValueError when heads are left over.
    """
    own, left = divmod(keys.shape[1], ranks)
    if left:
        raise ValueError(f"{ranks} ranks cannot share {keys.shape[1]} KV heads evenly")
    parts = zip(torch.split(keys, own, dim=1), torch.split(values, own, dim=1), strict=True)
    return [torch.cat(part, dim=1) for part in parts]


def join_heads(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The reverse of :func:`split_heads`, from the rows of all ranks in order: contiguous copies of keys and values."""
    halves = [part.chunk(2, dim=1) for part in parts]
    return torch.cat([keys for keys, _ in halves], dim=1), torch.cat([values for _, values in halves], dim=1)
