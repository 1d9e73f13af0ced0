"""Everything a decoder asks of its hardware, and the plain-torch answer: the reference for all others, and what runs
where nothing faster does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from engine import attention
from engine.attention import Span

Plan = TypeVar("Plan")


class Linear(Protocol):
    """A weight matrix W [outputs, inputs], and perhaps a bias, as this hardware likes it."""

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T + b. x: [rows, inputs], rows may be 0. Returns [rows, outputs] in memory of its own."""


class Ops(Protocol[Plan]):
    """Tensors are in the model's compute dtype unless said otherwise. ``Plan`` is what :meth:`plan` makes of a step."""

    def pack(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """``weight`` [outputs, inputs] in its checkpoint's dtype, ``bias`` [outputs]. Neither changes afterwards."""

    def norm(self, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm (arXiv:1910.07467) over the last dimension. Leaves ``hidden`` as it is."""

    def add_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """``hidden + delta`` and its RMSNorm, all [rows, hidden]. May reuse the memory of ``hidden``."""

    def rope_write(self, plan: Plan, qkv: Tensor, cos: Tensor, sin: Tensor, layer: Tensor) -> None:
        """Rotates queries and keys in place, then writes keys and values to their slots of the cache.

        qkv: [rows, heads + 2 * kv_heads, head_dim]; cos, sin: [rows, head_dim] of :func:`engine.rope.rope_tables`;
        layer: [slots, 2 * kv_heads, head_dim], keys first.
        """

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[rows, 2 * width] to [rows, width]: SiLU of the first half times the second (SwiGLU, arXiv:2002.05202)."""

    def plan(self, decodes: Sequence[Span], chunks: Sequence[Span], page_tokens: int) -> Plan:
        """What attention needs to know of a step, once for all layers. The step's rows are the decodes, one each and
        sorted by falling context length, then the chunks."""

    def attend(self, plan: Plan, qkv: Tensor, layer: Tensor, window: int | None) -> Tensor:
        """Causal attention of every row over its sequence's pages, which hold the step's own KV already.

        ``qkv`` and ``layer`` as :meth:`rope_write` left them. ``window`` is how many tokens back a row sees, itself
        included; None is all. Returns [rows, heads * head_dim].
        """


class TorchOps:
    """Plain torch, on any device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device

    def pack(self, weight: Tensor, bias: Tensor | None) -> Linear:
        # float32 on CPU reads a transposed matrix faster, bf16 without hardware ten times slower: ADR 4.
        if self._dtype == torch.float32 and self._device.type == "cpu":
            weight = weight.t().to(self._dtype).contiguous().t()
        else:
            weight = weight.to(self._dtype)
        bias = None if bias is None else bias.to(self._dtype)
        return lambda x: linear(x, weight, bias)

    def norm(self, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(hidden, weight.shape, weight, eps)

    def add_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        hidden = hidden + delta
        return hidden, rms_norm(hidden, weight.shape, weight, eps)

    def rope_write(self, plan: attention.AttentionPlan, qkv: Tensor, cos: Tensor, sin: Tensor, layer: Tensor) -> None:
        kv_heads, head_dim = layer.shape[1] // 2, layer.shape[2]
        rotated = qkv[:, :-kv_heads]
        swapped = rotated.roll(head_dim // 2, dims=-1)  # the halves of each head; ``sin`` carries the sign
        rotated.mul_(cos[:, None]).addcmul_(swapped, sin[:, None])
        layer.index_copy_(0, plan.written, qkv[:, -2 * kv_heads :])

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    def plan(self, decodes: Sequence[Span], chunks: Sequence[Span], page_tokens: int) -> attention.AttentionPlan:
        return attention.plan(decodes, chunks, page_tokens=page_tokens, device=self._device)

    def attend(self, plan: attention.AttentionPlan, qkv: Tensor, layer: Tensor, window: int | None) -> Tensor:
        kv = layer.shape[1]
        return plan.attend(qkv[:, :-kv], qkv[:, -kv:], layer, window)
