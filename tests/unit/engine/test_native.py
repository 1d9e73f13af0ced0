"""Every compiled kernel against plain torch, on random shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from engine.attention import Span
from engine.native import build
from engine.native.library import Library
from engine.native.ops import NativeOps, native_ops
from engine.ops import TorchOps

if TYPE_CHECKING:
    from pathlib import Path

    from engine.model import Model
    from tests.unit.engine.conftest import Harness

TWIN = TorchOps(torch.float32, torch.device("cpu"))
CONTEXTS = (700, 300, 65, 64, 9, 1)  # of decodes, long ones first
CHUNKS = ((0, 150), (33, 97), (18, 2), (64, 64))  # start, count
SHAPES = {  # heads, kv_heads, head_dim, page_tokens
    "smollm": (9, 3, 64, 16),
    "mha": (4, 4, 16, 1),
    "mqa": (8, 1, 128, 5),
    "narrow": (6, 2, 8, 4),
    "odd-width": (16, 2, 80, 64),
    "wide": (2, 1, 256, 7),
}

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.fixture(scope="module", params=[1, 3], ids=["one-thread", "three-threads"])
def native(request: pytest.FixtureRequest) -> NativeOps:
    return NativeOps(Library(build.library()), request.param)


@pytest.fixture(scope="module")
def alone() -> NativeOps:
    return NativeOps(Library(build.library()), 1)


def spans_of(contexts: Sequence[tuple[int, int]], page_tokens: int, generator: torch.Generator) -> list[Span]:
    """(start, count) pairs, each with shuffled pages of its own and one page more than it needs."""
    needs = [-(-(start + count) // page_tokens) + 1 for start, count in contexts]
    free = torch.randperm(sum(needs), generator=generator).tolist()
    return [
        Span(start, count, tuple(free.pop() for _ in range(n)))
        for (start, count), n in zip(contexts, needs, strict=True)
    ]


@pytest.mark.parametrize("kv", [torch.float32, torch.bfloat16], ids=["kv-f32", "kv-bf16"])
@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_of_decodes_and_chunks(native: NativeOps, shape: str, window: int | None, kv: torch.dtype) -> None:
    heads, kv_heads, head_dim, page_tokens = SHAPES[shape]
    generator = torch.Generator().manual_seed(heads * head_dim)
    spans = spans_of([(c - 1, 1) for c in CONTEXTS] + list(CHUNKS), page_tokens, generator)
    decodes, chunks = spans[: len(CONTEXTS)], spans[len(CONTEXTS) :]
    rows, pages = sum(span.count for span in spans), sum(len(span.pages) for span in spans)
    layer = torch.randn(pages * page_tokens, 2 * kv_heads, head_dim, generator=generator).to(kv)
    qkv = torch.randn(rows, heads + 2 * kv_heads, head_dim, generator=generator)
    cos, sin = torch.randn(2, rows, head_dim, generator=generator).unbind()

    ours, cache = qkv.clone(), layer.clone()
    plan = native.plan(decodes, chunks, page_tokens)
    native.rope_write(plan, ours, cos, sin, cache)
    attended = native.attend(plan, ours, cache, window)

    # The twin keeps float32 pages of the same values: torch's attention wants one dtype.
    theirs, twin_cache = qkv.clone(), layer.float()
    twin_plan = TWIN.plan(decodes, chunks, page_tokens)
    TWIN.rope_write(twin_plan, theirs, cos, sin, twin_cache)
    twin_cache = twin_cache.to(kv).float()
    theirs[:, heads:] = twin_cache[twin_plan.written]  # a first chunk is attended to as it lies in the cache, too
    expected = TWIN.attend(twin_plan, theirs, twin_cache, window)

    assert torch.equal(plan.written, twin_plan.written)
    torch.testing.assert_close(ours[:, :heads], theirs[:, :heads], rtol=1e-5, atol=1e-5)
    # Both round to bf16 what differs in the last bit of float32: it may fall to the neighbour.
    exact = kv == torch.float32
    torch.testing.assert_close(cache.float(), twin_cache, rtol=1e-5 if exact else 1e-2, atol=1e-5)
    torch.testing.assert_close(attended, expected, rtol=1e-4 if exact else 1e-2, atol=2e-5 if exact else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 960), (57, 100), (1, 1), (1536, 33), (64, 15)])
def test_packed_products(native: NativeOps, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs)
    plain, biased = native.pack(weight, None), native.pack(weight, bias)
    for rows in (0, *range(1, 15), 130):
        x = torch.randn(rows, inputs)
        expected = x.double() @ weight.double().t()
        torch.testing.assert_close(plain(x).double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(biased(x).double(), expected + bias, rtol=1e-4, atol=1e-4)


def test_a_product_of_bf16_weights_equals_that_of_the_same_weights_in_float32(alone: NativeOps) -> None:
    weight, x = torch.randn(320, 192).bfloat16(), torch.randn(9, 192)
    assert torch.equal(alone.pack(weight, None)(x), alone.pack(weight.float(), None)(x))


def test_products_take_slices_and_leave_them_alone(alone: NativeOps) -> None:
    weight, x = torch.randn(40, 24), torch.randn(6, 48)
    before = x.clone()
    ours = alone.pack(weight, None)(x[:, ::2])
    torch.testing.assert_close(ours, x[:, ::2] @ weight.t(), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("rows", "width"), [(1, 576), (70, 576), (3, 50), (0, 16)])
def test_norms(native: NativeOps, rows: int, width: int) -> None:
    hidden, delta, weight = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    kept = hidden.clone()
    torch.testing.assert_close(native.norm(hidden, weight, 1e-5), TWIN.norm(hidden, weight, 1e-5))
    assert torch.equal(hidden, kept)
    expected = TWIN.add_norm(kept, delta, weight, 1e-5)
    for ours, theirs in zip(native.add_norm(hidden, delta, weight, 1e-5), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("rows", "width"), [(1, 1536), (70, 96), (3, 13)])
def test_silu_mul(native: NativeOps, rows: int, width: int) -> None:
    gate_up = torch.randn(rows, 2 * width) * 20
    torch.testing.assert_close(native.silu_mul(gate_up), TWIN.silu_mul(gate_up), rtol=1e-6, atol=1e-30)


def test_silu_of_extreme_values_is_finite_and_right(alone: NativeOps) -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 1e30]])
    ours = alone.silu_mul(torch.cat((gate, torch.ones_like(gate)), dim=1))
    torch.testing.assert_close(ours, torch.nn.functional.silu(gate.double()).float(), rtol=1e-6, atol=1e-6)


def test_scores_far_apart_do_not_overflow(alone: NativeOps) -> None:
    """Softmax of scores around +-1e4: everything but the best key weighs nothing."""
    layer = torch.randn(80, 2, 8)
    qkv = torch.cat((torch.full((1, 1, 8), 3e4), torch.randn(1, 2, 8)), dim=1)
    spans = [Span(79, 1, tuple(range(5)))]
    ours = alone.attend(alone.plan(spans, [], 16), qkv, layer, None)
    torch.testing.assert_close(ours, TWIN.attend(TWIN.plan(spans, [], 16), qkv, layer, None))


def test_a_table_that_is_too_short_is_refused(alone: NativeOps) -> None:
    with pytest.raises(IndexError, match="33 tokens in 2 pages of 16"):
        alone.plan([Span(32, 1, (0, 1))], [], 16)


def test_a_long_context_is_split_between_threads(native: NativeOps) -> None:
    layer, qkv = torch.randn(3000, 2, 32), torch.randn(1, 4, 32)
    spans = [Span(2950, 1, tuple(range(200)))]
    ours = native.attend(native.plan(spans, [], 15), qkv, layer, None)
    torch.testing.assert_close(ours, TWIN.attend(TWIN.plan(spans, [], 15), qkv, layer, None), rtol=1e-4, atol=1e-5)


def test_heads_that_no_kernel_takes_are_left_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    assert native_ops(12, 1) is None
    assert "plain torch" in caplog.text


def run(model: Model, ops: NativeOps | TorchOps, harness: Harness) -> dict[str, list[int]]:
    model.ops = ops
    engine = harness.engine(model, step_tokens=24)
    for index, length in enumerate((3, 60, 17, 40)):
        engine.add(harness.work(f"r{index}", harness.prompt(length, seed=index)))
    return {name: harness.tokens(events) for name, events in harness.run(engine).items()}


@pytest.mark.parametrize("bf16", [False, True], ids=["f32-weights", "bf16-weights"])
def test_a_whole_model_generates_the_same_tokens(
    tmp_path: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch, alone: NativeOps, bf16: bool
) -> None:
    folder = harness.save_llama(tmp_path, **({"dtype": "bfloat16"} if bf16 else {}))
    tokens = []
    for ops in (alone, TWIN):
        monkeypatch.setattr("engine.build.choose_ops", lambda *_, ops=ops: ops)
        from engine.build import load_model

        tokens.append(run(load_model(folder, "float32", 1), ops, harness))
    assert tokens[0] == tokens[1]


def test_operations_return_memory_of_their_own(alone: NativeOps) -> None:
    linear = alone.pack(torch.randn(16, 8), None)
    x = torch.randn(2, 8)
    first: Tensor = linear(x)
    kept = first.clone()
    linear(-x)
    assert torch.equal(first, kept)
