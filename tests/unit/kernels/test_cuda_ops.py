"""A whole model on the CUDA kernels against plain torch: mixed steps, and decode batches padded as graphs have them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import triton

from engine.attention import Span
from engine.cache import KVCache
from engine.cuda_ops import CudaOps
from engine.graphs import Inputs, batch_sizes
from engine.kernels import paged_decode
from engine.kernels.paged_decode import choose_splits, contexts_of_all_kernels
from engine.model import Model
from engine.ops import Ops, TorchOps
from engine.runner import Runner, Step
from engine.spec import ModelSpec

PAGE_TOKENS, PAGES = 4, 16
SPEC = ModelSpec(
    vocab_size=40,
    hidden=24,
    intermediate=20,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    tied_head=True,
    max_context=32,
    bos_token_id=None,
    eos_token_ids=(),
    qk_norm=True,
    windows=(5, None),
)
# A sequence of 11 tokens and one of 6, then one token each and a prompt of 5 after 3 known tokens.
FIRST = Step(tuple(range(17)), (10, 16), (Span(0, 11, (3, 9, 1)), Span(0, 6, (14, 0))), 0)
MIXED = Step(
    (7, 8, *range(20, 28)),
    (0, 1, 9),
    (Span(11, 1, (3, 9, 1)), Span(6, 1, (14, 0)), Span(0, 3, (5,)), Span(0, 5, (6, 2))),
    2,
)
CONTINUED = Step((30, 31, 32), (2,), (Span(5, 3, (6, 2)),), 0)
DECODE = Step((4, 5, 6), (0, 1, 2), (Span(12, 1, (3, 9, 1, 8)), Span(7, 1, (14, 0)), Span(3, 1, (5,))), 3)

Build = Callable[[type[TorchOps] | type[CudaOps]], tuple[Model, KVCache]]


@pytest.fixture
def build(device: torch.device) -> Build:
    def of(kind: type[TorchOps] | type[CudaOps]) -> tuple[Model, KVCache]:
        ops: Ops[Any] = kind(torch.float32, device)
        model = Model(SPEC, name="tiny", dtype="float32", device=device, ops=ops)
        draw = torch.Generator(device).manual_seed(3)
        for tensor in _weights(model):
            tensor.normal_(generator=draw).mul_(0.3)
        model.pack()
        return model, KVCache(model.layout, pages=PAGES, page_tokens=PAGE_TOKENS, device=device)

    return of


def _weights(model: Model) -> list[torch.Tensor]:
    found = [model.embedding, model.norm]
    for layer in model.layers:
        assert layer.head_norms is not None
        matrices = (layer.qkv, layer.out, layer.mlp.gate_up, layer.mlp.down)
        found += [layer.attention_norm, layer.mlp_norm, *layer.head_norms, *(matrix.weight for matrix in matrices)]
    return found


def test_steps_give_the_logits_and_the_cache_of_plain_torch(build: Build) -> None:
    plain, fast = build(TorchOps), build(CudaOps)
    for step in (FIRST, MIXED, CONTINUED, DECODE):
        expected, got = (Runner(model, cache).run(step) for model, cache in (plain, fast))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for expected, got in zip(plain[1].layers, fast[1].layers, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_padded_batch_is_the_step(build: Build, device: torch.device) -> None:
    model, cache = build(CudaOps)
    runner = Runner(model, cache)
    for step in (FIRST, MIXED):
        runner.run(step)
    inputs = Inputs(8, 8, PAGE_TOKENS, device)
    inputs.fill(8, tuple(range(8)), (Span(30, 1, (15,) * 8),) * 8)  # stale rows
    before = [layer.clone() for layer in cache.layers]
    inputs.fill(4, DECODE.tokens, DECODE.spans)
    padded = model.forward(inputs.batch(4), cache)
    assert padded.shape == (4, SPEC.vocab_size)
    written = [layer.clone() for layer in cache.layers]
    for old, new in zip(before, written, strict=True):
        changed = (old != new).flatten(1).any(dim=1).nonzero().flatten().tolist()
        assert changed == [3, 23, 32]  # page 0 offset 3, page 5 offset 3, page 8 offset 0; none of a padding row
    torch.testing.assert_close(padded[:3], runner.run(DECODE))
    for old, new in zip(written, cache.layers, strict=True):
        torch.testing.assert_close(old, new)


def test_a_row_that_got_a_page_is_copied_again(build: Build, device: torch.device) -> None:
    inputs = Inputs(2, 4, PAGE_TOKENS, device)
    inputs.fill(2, (1, 2), (Span(3, 1, (5,)), Span(2, 1, (7,))))
    inputs.fill(1, (1,), (Span(4, 1, (5, 6)),))
    inputs.fill(2, (1, 2), (Span(5, 1, (5, 6)), Span(3, 1, (7,))))
    batch = inputs.batch(2)
    assert batch.attention.table.tolist() == [[5, 6, 0, 0], [7, 0, 0, 0]]
    assert batch.attention.contexts.tolist() == [6, 4]
    assert batch.attention.written.tolist() == [6 * PAGE_TOKENS + 1, 7 * PAGE_TOKENS + 3]
    assert batch.positions.tolist() == [5, 3]


@pytest.mark.parametrize("largest", [1, 3, 8, 64, 100, 256, 1000])
def test_batch_sizes_rise_to_the_largest(largest: int) -> None:
    sizes = batch_sizes(largest)
    assert sizes[-1] == largest
    assert list(sizes) == sorted(set(sizes))
    assert all(above <= max(below + 64, 2 * below) for below, above in pairwise(sizes))


@pytest.mark.parametrize("processors", [1, 4, 132])
@pytest.mark.parametrize("kv_heads", [1, 3, 8])
@pytest.mark.parametrize("longest", [1, 256, 257, 2048, 5000, 40_000])
def test_warm_up_meets_every_kernel_that_decodes_can_need(processors: int, kv_heads: int, longest: int) -> None:
    def kernels(sequences: int, context: int) -> tuple[bool, int]:
        splits = choose_splits(sequences, kv_heads, context, processors)
        return splits > 1, triton.next_power_of_2(splits)

    contexts = contexts_of_all_kernels(kv_heads, longest, processors)
    assert all(1 <= context <= longest for context in contexts)
    compiled = {kernels(1, context) for context in contexts}
    assert len(compiled) == len(contexts)  # none twice
    every = {kernels(n, context) for n in (1, 2, 3, 5, 8, 64, 600) for context in range(1, longest + 1, 64)}
    assert every <= compiled


def test_warm_up_steps_use_page_0_alone_and_leave_no_broken_kv(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = build(CudaOps)
    monkeypatch.setattr(paged_decode, "SPLIT_TOKENS", 8)
    runner = Runner(model, cache)
    steps = runner.warm_up_steps()
    assert [step.decodes for step in steps] == [0, 1, 1, 1]
    assert [step.spans[0].start + 1 for step in steps] == [1, 1, 9, 25]  # 1, 2 and 4 splits of at most 32 tokens
    for step in steps:
        assert {page for span in step.spans for page in span.pages} == {0}
        assert runner.run(step).isfinite().all()
    for layer in cache.layers:
        assert layer[PAGE_TOKENS:].count_nonzero() == 0
