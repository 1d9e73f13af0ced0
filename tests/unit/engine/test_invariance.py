"""A row comes out bit for bit the same alone and in any batch, and a prompt however it is cut."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch

from baton.request import Sampling
from engine.attention import Span
from engine.native import build
from engine.native.library import Library
from engine.native.ops import NativeOps

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.model import Model
    from tests.unit.engine.conftest import Harness

HEADS, KV_HEADS, HEAD_DIM, PAGE = 6, 2, 16, 8
LENGTH = 300

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.fixture(scope="module", params=[1, 2], ids=["one-thread", "two-threads"])
def ops(request: pytest.FixtureRequest) -> NativeOps:
    return NativeOps(Library(build.library()), request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 160), (576, 100), (33, 16)])
def test_products(ops: NativeOps, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(inputs)
    linear = ops.pack(torch.randn(outputs, inputs).to(dtype), torch.randn(outputs))
    x = torch.randn(600, inputs)
    whole = linear(x)
    for first, count in [(index, size) for size in range(1, 20) for index in (0, 7)] + [(50, 512)]:
        assert torch.equal(linear(x[first : first + count]), whole[first : first + count]), (first, count)


@pytest.mark.parametrize("window", [None, 50])
def test_attention(ops: NativeOps, window: int | None) -> None:
    torch.manual_seed(0)
    pages = tuple(torch.randperm(2 * LENGTH // PAGE).tolist())
    layer = torch.randn(2 * LENGTH + PAGE, 2 * KV_HEADS, HEAD_DIM)
    qkv = torch.randn(LENGTH, HEADS + 2 * KV_HEADS, HEAD_DIM)

    def attend(decodes: list[int], chunks: list[tuple[int, int]]) -> torch.Tensor:
        rows = [*decodes, *(row for start, count in chunks for row in range(start, start + count))]
        spans = [Span(row, 1, pages) for row in decodes], [Span(start, count, pages) for start, count in chunks]
        return ops.attend(ops.plan(*spans, PAGE), qkv[rows], layer, window)

    whole = attend([], [(0, LENGTH)])
    rng = random.Random(1)
    for _ in range(20):
        cuts = sorted(rng.sample(range(1, LENGTH), 5))
        parts = list(zip([0, *cuts], [*cuts, LENGTH], strict=True))
        chunks = [(start, end - start) for start, end in parts]
        assert torch.equal(attend([], chunks), whole), chunks
        start, count = rng.choice([(LENGTH - 1, 1), (7, 1), *chunks])
        assert torch.equal(attend([], [(start, count)]), whole[start : start + count]), (start, count)
    together = attend([299, 280, 64, 63, 3, 0], [(10, 20)])
    for index, row in enumerate((299, 280, 64, 63, 3, 0)):
        assert torch.equal(attend([row], []), together[index : index + 1]), row
    assert torch.equal(together[6:], whole[10:30])


def test_log_probabilities_of_a_whole_model(tiny: Model, harness: Harness) -> None:
    """Together and alone, in chunks and whole, with what is cached and without: the same bits."""
    assert isinstance(tiny.ops, NativeOps)
    sampling = Sampling(temperature=0.0, max_tokens=12, logprobs=True, eos_token_ids=())
    prompts = [harness.prompt(length, seed) for seed, length in enumerate((1, 2, 30, 90, 64, 17))]

    def run(engine: Engine, chosen: list[int]) -> dict[str, list[tuple[int, float | None]]]:
        for index in chosen:
            engine.add(harness.work(str(index), prompts[index], sampling))
        return {name: [(e.token, e.logprob) for e in events] for name, events in harness.run(engine).items()}

    engine = harness.engine(tiny, step_tokens=256)
    together = run(engine, list(range(6)))
    chunked = run(harness.engine(tiny, step_tokens=9, max_running=3), list(range(6)))
    assert chunked == together
    for index in range(6):
        assert run(harness.engine(tiny, step_tokens=256), [index]) == {str(index): together[str(index)]}
        assert run(engine, [index]) == {str(index): together[str(index)]}  # most of it found in the cache
