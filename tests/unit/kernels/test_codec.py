"""Codecs in pages against the CPU's: byte for byte on the wire, and value for value in the pages."""

from __future__ import annotations

import pytest
import torch

from baton.layout import Dtype, KVLayout
from engine.cache import TORCH_DTYPES
from engine.kernels.codec import PagedKernels
from kvtransfer.codecs import CodecError, make_codec
from kvtransfer.codecs.paged import PagedCodec, make_paged

NAMES = ["raw", "lossless", "int8", "fp8", "int6", "int4", "int2"]
SHAPES = [(2, 64, 5), (1, 128, 40), (3, 80, 3), (1, 6, 1)]


def pages(layout: KVLayout, device: torch.device) -> torch.Tensor:
    """[64 rows, 2 * kv_heads, head_dim], one row's first head all zero."""
    layer = torch.randn(64, 2 * layout.kv_heads, layout.head_dim, device=device).mul_(5).to(TORCH_DTYPES[layout.dtype])
    layer[7, 0] = 0.0
    return layer


def paged(name: str, layout: KVLayout) -> PagedCodec:
    codec = make_paged(name, layout, PagedKernels())
    assert codec is not None
    return codec


def check(name: str, layout: KVLayout, tokens: int, device: torch.device, **place: int) -> None:
    host, mine = make_codec(name, layout), paged(name, layout)
    layer = pages(layout, device)
    slots = torch.cat((torch.tensor([7]), torch.randperm(63)[: tokens - 1] + 1))[:tokens].to(device)
    wire, room = bytearray(host.bound(tokens)), bytearray(mine.bound(tokens))
    keys, values = layer[slots].chunk(2, dim=1)
    nbytes = host.encode(keys, values, memoryview(wire), **place)
    made = mine.encode(layer, slots, memoryview(room), **place)
    if name == "lossless":  # which planes are compressed is the encoder's choice
        for got, want in zip(host.decode(memoryview(room)[:made], tokens), (keys, values), strict=True):
            assert torch.equal(got, want.cpu())
    else:
        assert room[:made] == wire[:nbytes]

    landed = torch.full_like(layer, 7.0)
    target = torch.randperm(64, device=device)[:tokens]
    mine.decode(memoryview(wire)[:nbytes], landed, target)
    decoded = torch.cat(host.decode(memoryview(wire)[:nbytes], tokens), dim=1).to(device)
    interpreted = device.type == "cpu" and layout.dtype == "bfloat16"  # Triton's interpreter truncates to bfloat16
    torch.testing.assert_close(landed[target], decoded, rtol=2**-7 if interpreted else 0.0, atol=0.0)
    landed[target] = 7.0
    assert bool((landed == 7.0).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_blocks(name: str, shape: tuple[int, int, int], dtype: Dtype, device: torch.device) -> None:
    """In the middle of a prompt."""
    kv_heads, head_dim, tokens = shape
    check(name, KVLayout("m", 1, kv_heads, head_dim, dtype), tokens, device, before=5, after=500)


@pytest.mark.parametrize(
    ("name", "before", "after"), [("int4", 0, 0), ("int6", 0, 9), ("int2", 0, 120), ("int2", 0, 0)]
)
def test_the_prompts_ends_are_kept_exactly(name: str, before: int, after: int, device: torch.device) -> None:
    check(name, KVLayout("m", 1, 1, 64, "float32"), 20, device, before=before, after=after)


@pytest.mark.parametrize("name", ["int4", "int2"])
def test_groups_of_tokens_and_what_remains(name: str, device: torch.device) -> None:
    layout = KVLayout("m", 1, 1, 8, "float32")
    host, mine = make_codec(name, layout), paged(name, layout)
    layer, slots = torch.randn(200, 2, 8, device=device), torch.randperm(200, device=device)[:131]
    wire, room = bytearray(host.bound(131)), bytearray(mine.bound(131))
    keys, values = layer[slots].chunk(2, dim=1)
    nbytes = host.encode(keys, values, memoryview(wire), before=1, after=128)
    assert mine.encode(layer, slots, memoryview(room), before=1, after=128) == nbytes
    assert room[:nbytes] == wire[:nbytes]


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan"), 2.0**127])
@pytest.mark.parametrize(("name", "head"), [("int8", 0), ("int4", 0), ("int4", 1)])
def test_what_cannot_be_quantised_is_refused(name: str, head: int, bad: float, device: torch.device) -> None:
    layout = KVLayout("m", 1, 1, 64, "float32")
    layer, slots = torch.randn(4, 2, 64, device=device), torch.tensor([1, 3], device=device)
    layer[3, head, 20] = bad
    codec = paged(name, layout)
    with pytest.raises(CodecError, match="not finite"):
        codec.encode(layer, slots, memoryview(bytearray(codec.bound(2))), before=1)


@pytest.mark.parametrize("name", NAMES)
def test_a_block_of_another_size_is_refused_and_writes_nothing(name: str, device: torch.device) -> None:
    layout = KVLayout("m", 1, 1, 64, "float32")
    codec, layer = paged(name, layout), torch.zeros(4, 2, 64, device=device)
    for nbytes in (0, 3, 100, codec.bound(2) + 1):
        with pytest.raises(CodecError):
            codec.decode(memoryview(bytearray(nbytes)), layer, torch.tensor([1, 3], device=device))
    assert not layer.any()


@pytest.mark.parametrize(("name", "at", "word"), [("int8", 0, 0x7F80), ("int8", 0, 0xBF80), ("int4", 4, 0x7F7F)])
def test_scales_that_no_encoder_writes_are_refused(name: str, at: int, word: int, device: torch.device) -> None:
    layout = KVLayout("m", 1, 1, 64, "float32")
    codec, layer = paged(name, layout), torch.ones(4, 2, 64, device=device)
    room, slots = bytearray(codec.bound(2)), torch.tensor([1, 3], device=device)
    layer[1] = torch.linspace(-3, 3, 64, device=device)
    nbytes = codec.encode(layer, slots, memoryview(room), before=1)
    room[at : at + 2] = word.to_bytes(2, "little")
    before = layer.clone()
    with pytest.raises(CodecError, match="finite"):
        codec.decode(memoryview(room)[:nbytes], layer, slots)
    assert torch.equal(layer, before)


def test_huge_but_honest_values_take_the_hosts_way(device: torch.device) -> None:
    layout = KVLayout("m", 1, 1, 64, "float32")
    codec, layer = paged("int8", layout), torch.randn(4, 2, 64, device=device).mul_(2.0**120)
    room, slots = bytearray(codec.bound(2)), torch.tensor([1, 3], device=device)
    nbytes = codec.encode(layer, slots, memoryview(room))
    landed = torch.zeros_like(layer)
    codec.decode(memoryview(room)[:nbytes], landed, slots)
    torch.testing.assert_close(landed[slots], layer[slots], rtol=0.0, atol=2.0**116)


def test_entropy_coded_levels_are_the_cpus() -> None:
    layout = KVLayout("m", 1, 1, 64, "float32")
    assert [make_paged(name, layout, PagedKernels()) for name in ("int4-zstd", "int8-zstd")] == [None, None]
