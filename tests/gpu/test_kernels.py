"""Kernels at the sizes they are for, against their plain-torch twins on the same device."""

from __future__ import annotations

import pytest
import torch

from baton.layout import KVLayout
from baton.request import Sampling
from engine import sampler
from engine.kernels import activation, norm, reference, rope, sampling
from engine.kernels.codec import PagedKernels
from kvtransfer.codecs import make_codec
from kvtransfer.codecs.paged import make_paged

pytestmark = pytest.mark.gpu

CLOSE = {"rtol": 2**-7, "atol": 2**-7}  # two roundings of bfloat16


@pytest.mark.parametrize(("rows", "columns"), [(1, 4096), (257, 576), (4096, 8192), (33, 16384)])
def test_norms(rows: int, columns: int, cuda: torch.device) -> None:
    hidden, delta = torch.randn(2, rows, columns, device=cuda, dtype=torch.bfloat16)
    weight = torch.randn(columns, device=cuda, dtype=torch.bfloat16)
    torch.testing.assert_close(norm.norm(hidden, weight, 1e-5), reference.norm(hidden, weight, 1e-5), **CLOSE)
    expected = reference.add_norm(hidden.clone(), delta, weight, 1e-5)
    got = norm.add_norm(hidden, delta, weight, 1e-5)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], **CLOSE)


@pytest.mark.parametrize(("rows", "width"), [(1, 14336), (300, 1536), (4096, 14336)])
def test_silu_mul(rows: int, width: int, cuda: torch.device) -> None:
    gate_up = torch.randn(rows, 2 * width, device=cuda, dtype=torch.bfloat16)
    torch.testing.assert_close(activation.silu_mul(gate_up), reference.silu_mul(gate_up), **CLOSE)


@pytest.mark.parametrize("shape", [(32, 8, 128), (9, 3, 64), (16, 2, 80)], ids=["32/8", "9/3", "16/2"])
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "qk-norm"])
def test_rope_write(shape: tuple[int, int, int], normed: bool, cuda: torch.device) -> None:
    (heads, kv_heads, head_dim), rows, cached = shape, 1000, 5000
    qkv = torch.randn(rows, heads + 2 * kv_heads, head_dim, device=cuda, dtype=torch.bfloat16)
    cos, sin = torch.randn(2, rows, head_dim, device=cuda, dtype=torch.bfloat16)
    slots = torch.randperm(cached, device=cuda)[:rows].to(torch.int32)
    slots[::7] = -1
    layer = torch.randn(cached, 2 * kv_heads, head_dim, device=cuda, dtype=torch.bfloat16)
    weights = torch.randn(2, head_dim, device=cuda, dtype=torch.bfloat16)
    norms = (weights[0], weights[1], 1e-6) if normed else None
    expected_qkv, expected_layer = qkv.clone(), layer.clone()
    reference.rope_write(expected_qkv, cos, sin, slots, expected_layer, norms)
    rope.rope_write(qkv, cos, sin, slots, layer, norms)
    torch.testing.assert_close(qkv, expected_qkv, **CLOSE)
    torch.testing.assert_close(layer, expected_layer, **CLOSE)


@pytest.mark.parametrize("vocab", [49152, 128256, 151936])
def test_choose_is_the_samplers(vocab: int, cuda: torch.device) -> None:
    draw = torch.Generator(cuda).manual_seed(vocab)
    logits = torch.randn(64, vocab, device=cuda, generator=draw) * 3
    logits[32:] = logits[32:].round()  # ties everywhere
    limits: list[dict[str, float]] = [
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 50},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.02},
        {"temperature": 0.9, "top_k": 400, "top_p": 0.8, "min_p": 0.01},
    ]
    samplings = [Sampling(seed=row, **limits[row % len(limits)]) for row in range(64)]  # type: ignore[arg-type]
    rows = [sampler.Row(own, index) for index, own in enumerate(samplings)]
    tokens = sampling.choose(logits, sampler.controls(rows).to(cuda)).tolist()
    assert tokens == [choice.token for choice in sampler.sample(logits.cpu(), rows)]
    assert tokens == [choice.token for choice in sampler.sample(logits, rows)]
    assert tokens == reference.choose(logits, sampler.controls(rows).to(cuda)).tolist()


@pytest.mark.parametrize("name", ["raw", "lossless", "int8", "fp8", "int6", "int4", "int2"])
@pytest.mark.parametrize("tokens", [3000, 3001])
def test_codecs_in_pages(name: str, tokens: int, cuda: torch.device) -> None:
    """Bytes as the CPU's codec writes them, and pages as it would fill them."""
    layout = KVLayout("m", 1, 8, 128, "bfloat16")
    host, mine = make_codec(name, layout), make_paged(name, layout, PagedKernels())
    assert mine is not None
    layer = torch.randn(8192, 16, 128, device=cuda).bfloat16()
    slots = torch.randperm(8192, device=cuda)[:tokens]
    wire, room = bytearray(host.bound(tokens)), bytearray(mine.bound(tokens))
    keys, values = (half.contiguous().cpu() for half in layer[slots].chunk(2, dim=1))
    nbytes = host.encode(keys, values, memoryview(wire))
    made = mine.encode(layer, slots, memoryview(room))
    assert room[:made] == wire[:nbytes]
    landed = torch.zeros_like(layer)
    mine.decode(memoryview(wire)[:nbytes], landed, slots)
    assert torch.equal(landed[slots].cpu(), torch.cat(host.decode(memoryview(wire)[:nbytes], tokens), dim=1))
