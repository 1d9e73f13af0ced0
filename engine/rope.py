"""Rotary position embedding: what the query and key vectors of each position are turned by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.spec import DynamicRope, LinearRope, Llama3Rope, ModelSpec, YarnRope


def rope_tables(spec: ModelSpec, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each [positions, head_dim] in float32; the first half of ``sin`` is negated.

    Rotary embedding (RoFormer, arXiv:2104.09864) in the half-split form of Hugging Face checkpoints. YaRN's attention
    factor is in both, so that queries and keys grow by it as they are rotated.
    """
    half = spec.head_dim // 2
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), _frequencies(spec))
    cos, sin = (torch.empty(positions, spec.head_dim) for _ in range(2))
    torch.cos(angles, out=cos[:, :half])
    torch.sin(angles, out=sin[:, half:])
    if isinstance(spec.rope_scaling, YarnRope):
        cos[:, :half] *= spec.rope_scaling.attention_factor
        sin[:, half:] *= spec.rope_scaling.attention_factor
    cos[:, half:] = cos[:, :half]
    torch.neg(sin[:, half:], out=sin[:, :half])
    return cos, sin


def _frequencies(spec: ModelSpec) -> Tensor:
    """Radians a position turns each pair of dimensions by: [head_dim / 2]."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponents
    match spec.rope_scaling:
        case None | DynamicRope():  # the engine takes no sequence beyond max_context, where the scaling would begin
            return frequencies
        case LinearRope(factor):
            return frequencies / factor
        case Llama3Rope(factor, low, high, original):
            turns = original * frequencies / (2 * math.pi)  # over the context the model was first trained on
            kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
            return frequencies * (kept + (1.0 - kept) / factor)
        case YarnRope() as yarn:
            divided = _yarn_ramp(yarn, spec.head_dim, spec.rope_theta)
            return frequencies * (1.0 - divided) + frequencies / yarn.factor * divided


def _yarn_ramp(yarn: YarnRope, head_dim: int, theta: float) -> Tensor:
    """0 where a frequency is kept, 1 where it is divided by the factor, between them along the dimensions."""

    def dimension(turns: float) -> float:
        """The (fractional) pair of dimensions that turns so often over the original context."""
        return head_dim * math.log(yarn.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.whole_dimensions:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001  # both ends in one dimension: a step
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0.0, 1.0)
