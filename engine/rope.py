"""Rotary position embedding: what each position's query and key vectors are turned by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.spec import LinearRope, Llama3Rope, ModelSpec


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
