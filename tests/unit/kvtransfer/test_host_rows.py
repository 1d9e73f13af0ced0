"""KV between pages in host memory and blocks, against torch's own indexing and the codec that knows no pages."""

from __future__ import annotations

import pytest
import torch

from baton.layout import KVLayout
from kvtransfer.codecs import CodecError, make_codec, native
from kvtransfer.codecs.host_rows import HostRaw, gather_rows, scatter_rows
from kvtransfer.pages import Rows

ROWS = 40


@pytest.fixture(params=["compiled", "plain torch"], autouse=True)
def _ways(request, monkeypatch):
    if request.param == "plain torch":
        monkeypatch.setattr(native, "load", lambda: None)


def made(head_dim, dtype, count=13):
    draw = torch.Generator().manual_seed(head_dim)
    layer = torch.randn(ROWS, 6, head_dim, generator=draw).to(dtype)
    return layer, torch.randperm(ROWS, generator=draw)[:count]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
def test_rows_are_what_torch_reads_and_writes(head_dim, dtype):
    layer, slots = made(head_dim, dtype)
    keys, values = Rows(layer, slots).gather()
    assert torch.equal(keys, layer[slots, :3])
    assert torch.equal(values, layer[slots, 3:])
    target = torch.zeros_like(layer)
    canonical = torch.stack((keys, values)).transpose(1, 2).contiguous()  # as codecs return them: heads first
    Rows(target, slots).scatter(*(half.transpose(0, 1) for half in canonical))
    want = torch.zeros_like(layer)
    want[slots] = layer[slots]
    assert torch.equal(target, want)


def test_another_dtype_is_converted_on_its_way_into_the_pages():
    layer, slots = made(8, torch.bfloat16)
    keys, values = torch.randn(2, 13, 3, 8)
    Rows(layer, slots).scatter(keys, values)
    assert torch.equal(layer[slots], torch.cat((keys, values), dim=1).bfloat16())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_raw_block_from_pages_is_the_codecs_own(dtype):
    layout = KVLayout("m", 1, 3, 64, dtype)
    layer, slots = made(64, getattr(torch, dtype))
    paged, plain = HostRaw(layout), make_codec("raw", layout)
    ours, theirs = bytearray(paged.bound(13)), bytearray(plain.bound(13))
    assert paged.encode(layer, slots, memoryview(ours)) == len(ours) == len(theirs)
    plain.encode(layer[slots, :3], layer[slots, 3:], memoryview(theirs))
    assert ours == theirs
    target = torch.zeros_like(layer)
    paged.decode(memoryview(ours), target, slots)
    assert torch.equal(target[slots], layer[slots])
    with pytest.raises(CodecError, match="raw block of"):
        paged.decode(memoryview(ours)[:-1], target, slots)


@pytest.mark.parametrize("slot", [-1, ROWS])
def test_a_slot_outside_touches_nothing(slot):
    layer, slots = made(8, torch.float32)
    slots[5], kept = slot, layer.clone()
    with pytest.raises(IndexError):
        gather_rows(layer, slots, torch.zeros(13, 6, 8))
    with pytest.raises(IndexError):
        scatter_rows(layer, slots, torch.zeros(13, 6, 8))
    assert torch.equal(layer, kept)


def test_tensors_that_cannot_be_walked_are_refused(request):
    if native.load() is None:
        pytest.skip("torch walks any tensor")
    layer, slots = made(8, torch.float32)
    for other in (torch.zeros(13, 6, 4), torch.zeros(12, 6, 8), torch.zeros(13, 6, 8).bfloat16()):
        with pytest.raises(ValueError, match="float"):
            gather_rows(layer, slots, other)
