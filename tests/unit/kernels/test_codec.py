"""Fused int8 blocks against their twin and, byte for byte, against the codec that puts them on the wire."""

from __future__ import annotations

import pytest
import torch

from baton.layout import Dtype, KVLayout
from engine.cache import TORCH_DTYPES
from engine.kernels import reference
from engine.kernels.codec import Int8Blocks
from kvtransfer.codecs import make_codec


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kv_heads", "head_dim", "tokens"), [(2, 64, 5), (1, 128, 40), (3, 80, 3), (1, 6, 1)])
def test_int8_blocks(kv_heads: int, head_dim: int, tokens: int, dtype: Dtype, device: torch.device) -> None:
    kernels, codec = Int8Blocks(), make_codec("int8", KVLayout("m", 1, kv_heads, head_dim, dtype))
    layer = torch.randn(64, 2 * kv_heads, head_dim, device=device).mul_(5).to(TORCH_DTYPES[dtype])
    slots = torch.randperm(64, device=device)[:tokens]
    layer[slots[0], 0] = 0.0
    block = torch.full((kernels.block_bytes(tokens, kv_heads, head_dim),), 255, dtype=torch.uint8, device=device)
    kernels.pack(layer, slots, block)
    assert torch.equal(block, reference.pack_int8(layer, slots))

    wire = bytearray(codec.bound(tokens))
    keys, values = layer[slots].chunk(2, dim=1)
    assert codec.encode(keys, values, memoryview(wire)) == len(wire) == block.numel()
    assert bytes(wire) == bytes(block.tolist())

    landed = torch.full_like(layer, 7.0)
    twin = landed.clone()
    target = torch.randperm(64, device=device)[:tokens]
    kernels.unpack(block, landed, target)
    reference.unpack_int8(block, twin, target)
    decoded = torch.cat(codec.decode(memoryview(wire), tokens), dim=1)
    assert torch.equal(twin[target].cpu(), decoded)
    interpreted = device.type == "cpu" and dtype == "bfloat16"  # Triton's interpreter truncates to bfloat16
    torch.testing.assert_close(landed, twin, rtol=2**-7 if interpreted else 0.0, atol=0.0)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan"), 2.0**127])
def test_what_cannot_be_quantised_shows_in_its_scale(bad: float, device: torch.device) -> None:
    layer, slots = torch.randn(4, 2, 64, device=device), torch.tensor([1, 3], device=device)
    layer[3, 1, 20] = bad
    block = torch.zeros(Int8Blocks().block_bytes(2, 1, 64), dtype=torch.uint8, device=device)
    Int8Blocks().pack(layer, slots, block)
    assert block[:8].view(torch.bfloat16).isfinite().tolist() == [True, True, True, False]  # [2 * heads, tokens]


def test_a_block_of_another_size_is_refused(device: torch.device) -> None:
    layer, slots = torch.randn(4, 2, 64, device=device), torch.tensor([1, 3], device=device)
    with pytest.raises(ValueError, match="264 bytes"):
        Int8Blocks().pack(layer, slots, torch.zeros(263, dtype=torch.uint8, device=device))


def test_no_tokens(device: torch.device) -> None:
    layer, slots = torch.randn(4, 2, 64, device=device), torch.empty(0, dtype=torch.int64, device=device)
    block = torch.empty(0, dtype=torch.uint8, device=device)
    before = layer.clone()
    Int8Blocks().pack(layer, slots, block)
    Int8Blocks().unpack(block, layer, slots)
    assert torch.equal(layer, before)
