"""Whose heads are whose: every degree splits what any other joined, for all small shapes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from baton.layout import KVLayout
from engine.heads import join_heads, share_of, split_heads

HEAD_DIM = 3


def shapes() -> Iterator[tuple[int, int, int, int]]:
    """Tokens, KV heads, and two degrees that share them."""
    for tokens in range(4):
        for heads in (1, 2, 3, 4, 6, 8):
            degrees = [degree for degree in range(1, heads + 1) if heads % degree == 0]
            yield from ((tokens, heads, first, second) for first in degrees for second in degrees)


def numbered(tokens: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in which every number says where it is."""
    numbers = torch.arange(2 * tokens * heads * HEAD_DIM).view(2, tokens, heads, HEAD_DIM)
    return numbers[0], numbers[1]


@pytest.mark.parametrize(("tokens", "heads", "first", "second"), list(shapes()))
def test_any_degree_hands_over_to_any_other(tokens: int, heads: int, first: int, second: int) -> None:
    keys, values = numbered(tokens, heads)
    joined = join_heads(split_heads(keys, values, first))
    assert all(torch.equal(*pair) for pair in zip(joined, (keys, values), strict=True))
    assert all(part.is_contiguous() for part in joined)
    parts = split_heads(*joined, second)
    assert len(parts) == second
    own = heads // second
    for rank, part in enumerate(parts):
        assert part.shape == (tokens, 2 * own, HEAD_DIM)
        for token in range(tokens):
            for head in range(own):
                assert torch.equal(part[token, head], keys[token, rank * own + head])
                assert torch.equal(part[token, own + head], values[token, rank * own + head])


def test_what_is_joined_is_a_copy() -> None:
    parts = split_heads(*numbered(2, 4), 2)
    keys, _ = join_heads(parts)
    parts[0].zero_()
    assert keys[1, 1, 2] == 17


def test_heads_that_are_left_over_are_refused() -> None:
    with pytest.raises(ValueError, match="4 ranks cannot share 6 KV heads evenly"):
        split_heads(*numbered(1, 6), 4)
    layout = KVLayout("model", layers=2, kv_heads=6, head_dim=8, dtype="float32")
    with pytest.raises(ValueError, match="4 ranks cannot share 6 KV heads evenly"):
        share_of(layout, 4)
    assert share_of(layout, 3) == KVLayout("model", layers=2, kv_heads=2, head_dim=8, dtype="float32")
