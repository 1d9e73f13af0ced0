"""The kernels' plain-torch twins: the same arguments, the same results within rounding, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu


def norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(hidden.float(), weight.shape, weight.float(), eps).to(hidden.dtype)


def add_norm(hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = (hidden.float() + delta.float()).to(hidden.dtype)
    return hidden.copy_(total), norm(total, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (silu(gate) * up).to(gate_up.dtype)


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    layer: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    kv_heads, head_dim = layer.shape[1] // 2, layer.shape[2]
    heads = qkv.shape[1] - 2 * kv_heads
    x = qkv[:, : heads + kv_heads].float()
    if norms is not None:
        query_weight, key_weight, eps = norms
        queries = rms_norm(x[:, :heads], (head_dim,), query_weight.float(), eps)
        x = torch.cat((queries, rms_norm(x[:, heads:], (head_dim,), key_weight.float(), eps)), dim=1)
    turned = x * cos.float()[:, None] + x.roll(head_dim // 2, dims=-1) * sin.float()[:, None]
    qkv[:, : heads + kv_heads] = turned.to(qkv.dtype)
    kept = slots >= 0
    layer[slots[kept].long()] = qkv[kept, heads:]


def choose(logits: Tensor, controls: Tensor) -> Tensor:
    """Sorts every row."""
    vocab = logits.shape[1]
    temperature, top_k, top_p, min_p, uniform = (column[:, None] for column in controls)
    order = logits.double().sort(dim=-1, descending=True)
    scaled = (logits.double() - order.values[:, :1]) / temperature.where(temperature > 0, torch.ones_like(temperature))
    sorted_scaled = scaled.gather(1, order.indices)
    rank = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab).long() - 1
    weights = torch.where(scaled >= sorted_scaled.gather(1, rank), scaled.exp(), 0.0)
    sorted_weights = weights.gather(1, order.indices)
    mass = sorted_weights.cumsum(dim=-1)
    short = mass - sorted_weights < top_p * mass[:, -1:]  # tokens that are still needed
    last = short.sum(dim=-1, keepdim=True).clamp(min=1) - 1
    weights = torch.where((top_p >= 1) | (weights >= sorted_weights.gather(1, last)), weights, 0.0)
    mass = torch.where(weights >= min_p, weights, 0.0).cumsum(dim=-1)
    drawn = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)
    greedy = (logits == logits.amax(dim=-1, keepdim=True)).int().argmax(dim=-1, keepdim=True)
    return torch.where(temperature > 0, drawn, greedy).squeeze(1)
