"""The decoder transformer (Llama family), over a flat batch of tokens and a paged KV cache. No Hugging Face classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from baton.layout import Dtype, KVLayout
from engine.attention import AttentionPlan
from engine.cache import TORCH_DTYPES, KVCache
from engine.spec import LinearRope, Llama3Rope, ModelSpec


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's rows, all sequences one after the other."""

    tokens: Tensor  # [rows]
    positions: Tensor  # [rows]
    wanted: Tensor  # [logits rows] indexes of the rows whose logits are needed
    attention: AttentionPlan


class Layer:
    """One block's weights, with q, k, v stacked in one matrix and gate, up in another: two large products, not five."""

    def __init__(self, spec: ModelSpec, empty: Callable[..., Tensor], matrix: Callable[[int, int], Tensor]) -> None:
        width = spec.heads * spec.head_dim
        self.attention_norm = empty(spec.hidden)
        self.qkv = matrix(width + 2 * spec.kv_heads * spec.head_dim, spec.hidden)
        self.out = matrix(spec.hidden, width)
        self.mlp_norm = empty(spec.hidden)
        self.gate_up = matrix(2 * spec.intermediate, spec.hidden)
        self.down = matrix(spec.hidden, spec.intermediate)


class Model:
    """Weights and the forward pass. ``engine.weights.load`` fills the weights, which start uninitialised."""

    def __init__(self, spec: ModelSpec, *, name: str, dtype: Dtype, device: torch.device) -> None:
        self.spec, self.dtype, self.device = spec, TORCH_DTYPES[dtype], device
        self.layout = KVLayout(name, spec.layers, spec.kv_heads, spec.head_dim, dtype)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=self.dtype, device=device)

        def matrix(rows: int, columns: int) -> Tensor:
            # float32 on CPU reads a transposed matrix faster, bf16 without hardware ten times slower: ADR 4.
            transposed = dtype == "float32" and device.type == "cpu"
            return empty(columns, rows).t() if transposed else empty(rows, columns)

        self.embedding = empty(spec.vocab_size, spec.hidden)
        self.layers = [Layer(spec, empty, matrix) for _ in range(spec.layers)]
        self.norm = empty(spec.hidden)
        self.head = self.embedding if spec.tied_head else empty(spec.vocab_size, spec.hidden)
        cos, sin = rope_tables(spec)
        self.cos, self.sin = cos.to(device, self.dtype), sin.to(device, self.dtype)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache, layer_written: Callable[[int], None] | None = None) -> Tensor:
        """Logits [wanted rows, vocab] of a step, whose KV is in ``cache`` afterwards.

        ``layer_written(layer)`` is called when a layer's KV of all rows is in its pages, before the next one.
        """
        attention, positions, wanted = batch.attention, batch.positions, batch.wanted
        hidden = self.embedding[batch.tokens]  # [rows, hidden]
        cos, sin = self.cos[positions, None], self.sin[positions, None]  # [rows, 1, head_dim]
        for index, layer in enumerate(self.layers):
            pages = cache.layers[index]
            queries, fresh = self._queries_and_kv(layer, hidden, cos, sin)
            pages.index_copy_(0, attention.written, fresh)
            if layer_written is not None:
                layer_written(index)
            attended = attention.attend(queries, fresh, pages)
            if index == len(self.layers) - 1:  # only logits follow: the other rows need no output, no MLP
                hidden, attended = hidden[wanted], attended[wanted]
            hidden = self._mix(layer, hidden, attended)
        return linear(rms_norm(hidden, (self.spec.hidden,), self.norm, self.spec.norm_eps), self.head)

    def _queries_and_kv(self, layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, heads, head_dim] and [rows, 2 * kv_heads, head_dim], queries and keys rotated to their positions."""
        spec = self.spec
        normed = rms_norm(hidden, (spec.hidden,), layer.attention_norm, spec.norm_eps)
        qkv = linear(normed, layer.qkv).view(-1, spec.heads + 2 * spec.kv_heads, spec.head_dim)
        rotated = qkv[:, : spec.heads + spec.kv_heads]
        swapped = rotated.roll(spec.head_dim // 2, dims=-1)  # the halves of each head; ``sin`` carries the sign
        rotated.mul_(cos).addcmul_(swapped, sin)
        return qkv[:, : spec.heads], qkv[:, spec.heads :]

    def _mix(self, layer: Layer, hidden: Tensor, attended: Tensor) -> Tensor:
        """Adds attention's output and then the MLP's. hidden: [rows, hidden], attended: [rows, heads * head_dim]."""
        hidden = hidden + linear(attended, layer.out)
        normed = rms_norm(hidden, (self.spec.hidden,), layer.mlp_norm, self.spec.norm_eps)
        gate, up = linear(normed, layer.gate_up).chunk(2, dim=-1)  # [rows, intermediate] each
        return hidden + linear(silu(gate).mul_(up), layer.down)


def rope_tables(spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """cos and sin, each [max_context, head_dim] in float32; the first half of ``sin`` is negated.

    Rotary embedding (RoFormer, arXiv:2104.09864) in the half-split form of Hugging Face checkpoints.
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = _scaled(1.0 / spec.rope_theta**exponents, spec)  # [head_dim / 2]
    angles = torch.outer(torch.arange(spec.max_context, dtype=torch.float32), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _scaled(frequencies: Tensor, spec: ModelSpec) -> Tensor:
    match spec.rope_scaling:
        case None:
            return frequencies
        case LinearRope(factor):
            return frequencies / factor
        case Llama3Rope(factor, low, high, original):
            turns = original * frequencies / (2 * math.pi)  # over the context the model was first trained on
            kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
            return frequencies * (kept + (1.0 - kept) / factor)
