"""Norms, activation and rotary write against their twins, over random shapes."""

from __future__ import annotations

import random

import pytest
import torch

from engine.kernels import activation, norm, reference, rope

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SHAPES = [(random.Random(columns).randint(1, 8), columns) for columns in (1, 17, 64, 100, 576)]


@DTYPES
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_norm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    hidden = torch.randn(rows, columns, device=device).mul_(3).to(dtype)
    weight = torch.randn(columns, device=device).to(dtype)
    before = hidden.clone()
    torch.testing.assert_close(
        norm.norm(hidden, weight, 1e-5), reference.norm(hidden, weight, 1e-5), **TOLERANCE[dtype]
    )
    assert torch.equal(hidden, before)


def test_norm_of_heads_inside_a_row(device: torch.device) -> None:
    qkv = torch.randn(3, 5, 16, device=device)
    weight = torch.randn(16, device=device)
    normed = norm.norm(qkv[:, 1:4], weight, 1e-6)
    torch.testing.assert_close(normed, reference.norm(qkv[:, 1:4], weight, 1e-6))


@DTYPES
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_add_norm(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    hidden, delta = (torch.randn(rows, columns, device=device).mul_(3).to(dtype) for _ in range(2))
    weight = torch.randn(columns, device=device).to(dtype)
    expected = reference.add_norm(hidden.clone(), delta, weight, 1e-5)
    got = norm.add_norm(hidden, delta, weight, 1e-5)
    torch.testing.assert_close(got[0], expected[0], rtol=2**-7, atol=0.0)  # the interpreter truncates to bfloat16
    torch.testing.assert_close(got[1], expected[1], **TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("width", [1, 96, 1030])
def test_silu_mul(width: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = torch.randn(4, 2 * width, device=device).mul_(4).to(dtype)
    torch.testing.assert_close(activation.silu_mul(gate_up), reference.silu_mul(gate_up), **TOLERANCE[dtype])


def test_no_rows(device: torch.device) -> None:
    empty, weight = torch.empty(0, 8, device=device), torch.ones(8, device=device)
    assert norm.norm(empty, weight, 1e-5).shape == (0, 8)
    assert norm.add_norm(empty, empty, weight, 1e-5)[1].shape == (0, 8)
    assert activation.silu_mul(empty).shape == (0, 4)


@DTYPES
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize(
    "shape", [(9, 3, 64), (4, 1, 16), (1, 1, 2), (8, 8, 20)], ids=["9/3 of 64", "4/1 of 16", "1/1 of 2", "8/8 of 20"]
)
def test_rope_write(shape: tuple[int, int, int], normed: bool, dtype: torch.dtype, device: torch.device) -> None:
    """shape: heads, kv_heads, head_dim."""
    (heads, kv_heads, head_dim), rows, cached = shape, 5, 12
    qkv = torch.randn(rows, heads + 2 * kv_heads, head_dim, device=device).to(dtype)
    angles = torch.randn(rows, head_dim // 2, device=device)
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1).to(dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), dim=-1).to(dtype)
    slots = torch.randperm(cached, device=device)[:rows]
    slots[2] = -1
    layer = torch.randn(cached, 2 * kv_heads, head_dim, device=device).to(dtype)
    before = layer.clone()
    weights = [torch.randn(head_dim, device=device).to(dtype) for _ in range(2)]
    norms = (weights[0], weights[1], 1e-6) if normed else None
    expected_qkv, expected_layer = qkv.clone(), layer.clone()
    reference.rope_write(expected_qkv, cos, sin, slots, expected_layer, norms)
    rope.rope_write(qkv, cos, sin, slots, layer, norms)
    torch.testing.assert_close(qkv, expected_qkv, **TOLERANCE[dtype])
    torch.testing.assert_close(layer, expected_layer, **TOLERANCE[dtype])
    untouched = sorted(set(range(cached)) - set(slots.tolist()))
    assert torch.equal(layer[untouched], before[untouched])
