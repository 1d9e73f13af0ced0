"""The ways to run a model on one accelerator type that a search considers."""

from __future__ import annotations

from placement.composition import Space, Way
from placement.cost import CostModel
from placement.handoff_cost import HandoffCost
from placement.hardware import Hardware
from placement.model_shape import ModelShape
from placement.replica import EngineLimits
from placement.roofline import replica
from placement.tables import Tables

DEGREES = ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2))
"""Tensor and pipeline degrees."""
PREFILL_STEPS = (2048, 8192)
"""Token budgets of a prefill step: below about 2,048 a large accelerator is not full."""
DECODE_BATCHES = (64, 256)
"""Most sequences in one decode step."""
WHOLE_STEPS = (512, 2048)
"""Token budgets of a step that mixes prefill chunks into decodes: TPOT against TTFT."""


def gpu_space(
    shape: ModelShape,
    hardware: Hardware,
    tables: Tables | None,
    *,
    longest: int,
    gap_s: float,
    pipeline: bool = False,
) -> Space:
    """Every degree that splits the model and leaves room for one request of ``longest`` tokens.

    gap_s: the TPOT asked for, up to which decode workers may let prompts stretch the gaps of streams.
    Without ``pipeline`` only what this system's workers can be: no stages, and every rank its own KV heads.
    """
    far: dict[tuple[int, int], CostModel] = {}
    near: dict[tuple[int, int], CostModel] = {}
    for tp, pp in DEGREES:
        if tp > hardware.gpus_per_node or not shape.allows(tp, pp):
            continue
        if not (pipeline or _deployable(shape, tp, pp)):
            continue
        cost = replica(shape, hardware, tables, tp=tp, pp=pp)
        if cost.kv_tokens() // pp >= longest:
            wire = hardware.intra_node_bytes_per_s * tp
            close = HandoffCost(shape.kv_token_bytes, shape.layers, wire, latency_s=hardware.link_latency_s)
            far[tp, pp], near[tp, pp] = cost, cost.with_handoff(close)
    prefill = tuple(EngineLimits(step_tokens=tokens) for tokens in PREFILL_STEPS)
    decode = tuple(EngineLimits(max_running=batch, gap_s=gap_s) for batch in DECODE_BATCHES)
    whole = tuple(EngineLimits(step_tokens=tokens, mixed_tokens=tokens) for tokens in WHOLE_STEPS)
    return Space(
        _ways(far, prefill), _ways(far, decode), _ways(far, whole), _ways(near, prefill), hardware.gpus_per_node
    )


def profiled_space(cost: CostModel, sending: CostModel, *, gap_s: float, page_tokens: int = 16) -> Space:
    """One way to run a replica, with the cost that was measured here, under several batch settings.

    ``sending``: of a prefill worker, whose KV leaves behind its steps.
    """
    degrees = {(1, 1): cost}
    prefill = tuple(EngineLimits(page_tokens, tokens, 64, 256, gap_s=gap_s) for tokens in (256, 512, 1024))
    decode = tuple(EngineLimits(page_tokens, 512, batch, 256, gap_s=gap_s) for batch in (8, 16, 64))
    return Space(_ways({(1, 1): sending}, prefill), _ways(degrees, decode), _ways(degrees, prefill))


def _ways(costs: dict[tuple[int, int], CostModel], limits: tuple[EngineLimits, ...]) -> tuple[Way, ...]:
    return tuple(Way(tp, pp, each, cost) for (tp, pp), cost in costs.items() for each in limits)


def _deployable(shape: ModelShape, tp: int, pp: int) -> bool:
    """As ``engine.ranks.require_divisible`` has it: no KV head is copied, and the vocabulary splits, too."""
    return pp == 1 and shape.kv_heads % tp == 0 and shape.vocab % tp == 0
