"""The model on CUDA against itself on the CPU, CUDA graphs against eager steps, and an engine's greedy tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from baton.request import Sampling, Work
from engine.attention import Span
from engine.cache import KVCache
from engine.cuda_ops import CudaOps
from engine.engine import Engine
from engine.graphs import DecodeGraphs
from engine.model import Model
from engine.ops import Ops, TorchOps
from engine.runner import Runner, Step
from engine.spec import ModelSpec

pytestmark = pytest.mark.gpu

PAGE_TOKENS, PAGES = 16, 256
SPEC = ModelSpec(
    vocab_size=1000,
    hidden=512,
    intermediate=1024,
    layers=4,
    heads=8,
    kv_heads=2,
    head_dim=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    tied_head=False,
    max_context=2048,
    bos_token_id=None,
    eos_token_ids=(),
    qk_norm=True,
    windows=(100, None, 100, None),
)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """float32 products in float32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def build(device: torch.device) -> tuple[Model, KVCache]:
    """The same float32 weights on any device."""
    on_gpu = device.type == "cuda"
    ops: Ops[Any] = CudaOps(torch.float32, device) if on_gpu else TorchOps(torch.float32, device)
    model = Model(SPEC, name="random", dtype="float32", device=device, ops=ops)
    draw = torch.Generator().manual_seed(11)
    for tensor in _weights(model):
        tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.08)
    model.pack()
    return model, KVCache(model.layout, pages=PAGES, page_tokens=PAGE_TOKENS, device=device)


def _weights(model: Model) -> list[torch.Tensor]:
    found = [model.embedding, model.head.weight, model.norm]
    for layer in model.layers:
        assert layer.head_norms is not None
        matrices = (layer.qkv, layer.out, layer.mlp.gate_up, layer.mlp.down)
        found += [layer.attention_norm, layer.mlp_norm, *layer.head_norms, *(matrix.weight for matrix in matrices)]
    return found


def steps() -> list[Step]:
    """A prompt; another in two chunks, each beside a decode of the first; then decodes of both."""
    first, second = tuple(range(5, 30)), tuple(range(100, 112))
    alone = Step(tuple(range(300)), (299,), (Span(0, 300, first),), 0)
    opening = Step((1, *range(90)), (0, 90), (Span(300, 1, first), Span(0, 90, second)), 1)
    closing = Step((2, *range(90, 150)), (0, 60), (Span(301, 1, first), Span(90, 60, second)), 1)
    decodes = [Step((3, 4), (0, 1), (Span(302 + n, 1, first), Span(150 + n, 1, second)), 2) for n in range(20)]
    return [alone, opening, closing, *decodes]


def test_logits_are_those_of_the_cpu(cuda: torch.device) -> None:
    cpu, gpu = build(torch.device("cpu")), build(cuda)
    for step in steps():
        expected, got = (Runner(*parts).run(step) for parts in (cpu, gpu))
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-3)
    for expected, got in zip(cpu[1].layers, gpu[1].layers, strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_graphs_are_the_eager_steps(cuda: torch.device) -> None:
    model, cache = build(cuda)
    eager = Runner(model, cache)
    graphs = DecodeGraphs(model, cache, 5)
    told: list[tuple[int, int]] = []
    graphs.capture(lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]  # 5, 4, 2, 1
    assert all(not layer.any() for layer in cache.layers)  # capturing wrote no KV
    for step in steps():
        kept = [layer.clone() for layer in cache.layers]
        replayed = graphs.forward(step)
        assert (replayed is None) == (step.decodes < len(step.spans))
        after = [layer.clone() for layer in cache.layers]
        for layer, old in zip(cache.layers, kept, strict=True):
            layer.copy_(old)
        expected = eager.run(step)
        if replayed is not None:
            torch.testing.assert_close(replayed, expected, rtol=1e-4, atol=1e-4)
            for got, layer in zip(after, cache.layers, strict=True):
                torch.testing.assert_close(got, layer, rtol=1e-4, atol=1e-4)


def test_a_batch_beyond_the_largest_graph_runs_eagerly(cuda: torch.device) -> None:
    model, cache = build(cuda)
    graphs = DecodeGraphs(model, cache, 2)
    graphs.capture(lambda done, total: None)
    three = Step((1, 2, 3), (0, 1, 2), tuple(Span(0, 1, (page,)) for page in range(3)), 3)
    assert graphs.forward(three) is None


def test_greedy_tokens_are_those_of_the_cpu(cuda: torch.device) -> None:
    prompts = [tuple(range(start, start + 20 + 7 * start)) for start in range(6)]
    tokens = []
    for device in (torch.device("cpu"), cuda):
        model, _ = build(device)
        engine = Engine(
            model, page_tokens=PAGE_TOKENS, pages=PAGES, step_tokens=64, max_running=8, max_waiting=8, mixed_tokens=32
        )
        if device.type == "cuda":
            engine.warm_up(8)
        for index, prompt in enumerate(prompts):
            engine.add(Work(f"r{index}", prompt, Sampling(temperature=0.0, max_tokens=24), 0, 60.0))
        out: dict[str, list[int]] = {}
        while engine.has_work:
            for event in engine.step():
                out.setdefault(event.request_id, []).append(event.token)
        tokens.append(out)
    assert tokens[0] == tokens[1]
