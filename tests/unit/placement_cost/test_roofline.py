from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import ConfigError
from placement.cost import StepShape, step_s
from placement.handoff_cost import HandoffCost
from placement.hardware import GEMM_EFFICIENCY, Hardware
from placement.kernels import Heads, RooflineKernels
from placement.model_shape import ModelShape
from placement.roofline import CONTEXT_TOKENS, STEP_TOKENS, GpuReplica, replica
from placement.tables import Tables

H200 = Hardware.load("h200-sxm")
LLAMA_8B, LLAMA_70B = ModelShape.load("llama-3.1-8b"), ModelShape.load("llama-3.1-70b")
ONE = replica(LLAMA_8B, H200)
FOUR = replica(LLAMA_70B, H200, tp=4)

CHUNKS = st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 2000)), max_size=4)
CONTEXTS = st.lists(st.integers(1, 30_000), max_size=40)
MODELS = st.sampled_from([ONE, FOUR])


@pytest.fixture(scope="module")
def measured(h200: Tables) -> GpuReplica:
    return replica(LLAMA_70B, H200, h200, tp=8)


def _check_rises(model: GpuReplica, chunks: list[tuple[int, int]], contexts: list[int]) -> None:
    step = StepShape(tuple(chunks), tuple(contexts))
    seconds = step_s(model, step)
    assert seconds > 0 if chunks or contexts else seconds == 0
    slack = 1 - 1e-9
    assert step_s(model, StepShape((*step.chunks, (0, 64)), step.contexts)) >= seconds * slack
    mean = -(-sum(contexts) // len(contexts)) if contexts else 64
    assert step_s(model, StepShape(step.chunks, (*step.contexts, mean))) >= seconds * slack
    assert step_s(model, StepShape(step.chunks, (*step.contexts, 64))) >= 0.95 * seconds
    longer = StepShape(step.chunks, tuple(context + 500 for context in step.contexts))
    assert step_s(model, longer) >= seconds * slack
    grown = StepShape(tuple((start, count + 50) for start, count in step.chunks), step.contexts)
    assert step_s(model, grown) >= seconds * slack


@settings(deadline=None)
@given(MODELS, CHUNKS, CONTEXTS)
def test_more_work_never_takes_less(model: GpuReplica, chunks: list[tuple[int, int]], contexts: list[int]) -> None:
    _check_rises(model, chunks, contexts)


def test_more_work_never_takes_less_on_measured_tables(measured: GpuReplica) -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        chunks = [(int(rng.integers(0, 8000)), int(rng.integers(1, 1500))) for _ in range(rng.integers(0, 4))]
        _check_rises(measured, chunks, rng.integers(1, 16_000, rng.integers(0, 30)).tolist())


@settings(deadline=None)
@given(MODELS, st.lists(st.integers(1, 5000), min_size=1, max_size=64))
def test_sum_of_contexts_is_enough(model: GpuReplica, contexts: list[int]) -> None:
    by_sum = model.decode_step_s(len(contexts), sum(contexts))
    assert by_sum == step_s(model, StepShape((), tuple(contexts)))


@settings(deadline=None)
@given(MODELS, st.lists(st.integers(1, 3000), min_size=2, max_size=6))
def test_chunks_cost_at_least_their_prompt(model: GpuReplica, counts: list[int]) -> None:
    starts = [sum(counts[:i]) for i in range(len(counts))]
    apart = sum(step_s(model, StepShape(((a, n),), ())) for a, n in zip(starts, counts, strict=True))
    assert apart >= step_s(model, StepShape(((0, sum(counts)),), ())) * (1 - 1e-9)


@settings(deadline=None)
@given(MODELS, CHUNKS.filter(len), CONTEXTS.filter(len))
def test_mixed_step_lies_between_the_longer_part_and_the_sum(
    model: GpuReplica, chunks: list[tuple[int, int]], contexts: list[int]
) -> None:
    mixed = step_s(model, StepShape(tuple(chunks), tuple(contexts)))
    parts = step_s(model, StepShape(tuple(chunks), ())), step_s(model, StepShape((), tuple(contexts)))
    assert max(parts) * (1 - 1e-9) <= mixed <= sum(parts) * 1.05


def test_one_decode_reads_the_weights_once() -> None:
    floor = LLAMA_8B.weight_bytes / H200.memory_bytes_per_s
    assert floor < ONE.decode_step_s(1, 100) < 2.2 * floor


def test_large_prefill_runs_at_the_reached_flops() -> None:
    tokens = 8192
    flops = 2 * LLAMA_8B.layers * LLAMA_8B.layer_parameters * tokens
    seconds = step_s(ONE, StepShape(((0, tokens),), ()))
    assert flops / H200.peak_flops("bfloat16") < seconds < 1.6 * flops / GEMM_EFFICIENCY / H200.peak_flops("bfloat16")


def test_kernel_formulas_by_hand() -> None:
    kernels, one = RooflineKernels(H200), np.ones(1)
    memory_bound = kernels.gemm(one, 8192, 8192).seconds[0]
    assert memory_bound == pytest.approx(3e-6 + 2 * (8192 * 8192 + 2 * 8192) / (4.8e12 * 0.8))
    compute_bound = kernels.gemm(8192 * one, 8192, 8192).seconds[0]
    assert compute_bound == pytest.approx(3e-6 + 2 * 8192**3 / (0.8 * 989e12))
    decode = kernels.decode_attention(16 * one, 8192 * one, Heads(64, 8, 128)).seconds[0]
    assert decode == pytest.approx(3e-6 + 16 * 8192 * 2 * 8 * 128 * 2 / (4.8e12 * 0.8))
    ring = kernels.all_reduce(one * 2**30, 8).seconds[0]
    assert ring == pytest.approx(1e-5 + 1.75 * 2**30 / 450e9)
    assert kernels.all_reduce(one, 1).seconds[0] == 0


def test_tensor_ranks_speed_up_less_than_their_number() -> None:
    steps = [StepShape(((0, 4096),), ()), StepShape((), (2000,) * 32)]
    for step in steps:
        seconds = [step_s(replica(LLAMA_70B, H200, tp=tp), step) for tp in (1, 2, 4, 8)]
        assert all(b < a < 2 * b for a, b in pairwise(seconds))


def test_pipeline_adds_sends_to_a_step() -> None:
    step = StepShape(((0, 1000),), ())
    straight, staged = replica(LLAMA_8B, H200), replica(LLAMA_8B, H200, pp=4)
    assert step_s(straight, step) < step_s(staged, step) < 1.05 * step_s(straight, step)
    assert staged.gpus == 4
    assert staged.kv_tokens() > 4 * straight.kv_tokens()


def test_kv_capacity_is_memory_beside_the_weights() -> None:
    left = H200.memory_bytes - LLAMA_8B.weight_bytes - H200.reserved_bytes
    assert ONE.kv_tokens() == left // LLAMA_8B.kv_token_bytes
    assert replica(LLAMA_70B, Hardware.load("a100-80g-sxm")).kv_tokens() == 0


def test_transfer_goes_over_every_ranks_port() -> None:
    wire_s = 1000 * LLAMA_70B.kv_token_bytes / (4 * 50e9)
    assert FOUR.transfer_s(1000) == pytest.approx(wire_s + 1e-5)
    assert FOUR.exposed_transfer_s(1000) == pytest.approx(wire_s / 80 + 1e-5)
    assert FOUR.transfer_s(0) == FOUR.exposed_transfer_s(0) == 0.0


def test_another_handoff_shares_the_steps() -> None:
    near = FOUR.with_handoff(HandoffCost(LLAMA_70B.kv_token_bytes, 80, 4 * 450e9))
    step = StepShape(((0, 100), (500, 30)), (700, 800))
    assert step_s(near, step) == step_s(FOUR, step)
    assert near.transfer_s(1000) < FOUR.transfer_s(1000) / 8
    step_s(near, StepShape(((0, 2 * STEP_TOKENS),), ()))
    assert near.extrapolations != FOUR.extrapolations


def test_beyond_the_tables_is_counted_and_still_rises() -> None:
    model = replica(LLAMA_8B, H200)
    assert not model.extrapolations
    inside = step_s(model, StepShape(((0, STEP_TOKENS),), ()))
    assert step_s(model, StepShape(((0, 2 * STEP_TOKENS),), ())) > 1.9 * inside
    assert step_s(model, StepShape(((CONTEXT_TOKENS, 100),), ())) > step_s(model, StepShape(((1000, 100),), ()))
    assert sum(model.extrapolations.values()) == 2


def test_measured_tables_say_what_they_do_not_cover(measured: GpuReplica, h200: Tables) -> None:
    model = replica(LLAMA_70B, H200, h200, tp=8)
    before = sum(model.extrapolations.values())
    step_s(model, StepShape(((0, 2048),), ()))
    model.decode_step_s(64, 64 * 1000)
    assert sum(model.extrapolations.values()) == before
    step_s(model, StepShape(((0, 16_384), (16_384, 1000)), ()))
    assert model.extrapolations["prefill attention over a longer context than measured"] == 1
    model.decode_step_s(2000, 2000 * 100_000)
    assert model.extrapolations["decode attention outside what was measured"] == 1


def test_shapes_that_do_not_split_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not split"):
        replica(LLAMA_8B, H200, tp=3)
