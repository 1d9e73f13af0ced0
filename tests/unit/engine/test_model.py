"""Our transformer against transformers' on the same random weights: logits, rope scalings, chunks, mixed steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from engine.attention import Span
from engine.build import load_model
from engine.cache import KVCache
from engine.model import Batch, Model

if TYPE_CHECKING:
    from tests.unit.engine.conftest import Harness

PAGE = 4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def cache_for(model: Model, pages: int = 64) -> KVCache:
    return KVCache(model.layout, pages=pages, page_tokens=PAGE, device=torch.device("cpu"))


def logits(model: Model, cache: KVCache, parts: list[tuple[list[int], Span]]) -> torch.Tensor:
    """Logits of all rows of one step. Parts of one token are decodes and come first."""
    decodes = [span for _, span in parts if span.count == 1]
    chunks = [span for _, span in parts if span.count > 1]
    attention = model.ops.plan(decodes, chunks, PAGE)
    tokens = torch.tensor([token for row, _ in parts for token in row])
    positions = torch.cat([torch.arange(span.start, span.start + span.count) for _, span in parts])
    return model.forward(Batch(tokens, positions, torch.arange(len(tokens)), attention), cache).clone()


def reference(folder: Path, prompt: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        result: torch.Tensor = theirs(torch.tensor([prompt])).logits[0]
    return result


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ],
    ids=["gqa", "tied", "mha", "mqa-wide-heads", "linear-rope", "llama3-rope", "theta"],
)
def test_logits_equal_transformers(tmp_path: Path, harness: Harness, changes: dict[str, Any]) -> None:
    folder = harness.save_llama(tmp_path, **changes)
    model = load_model(folder, "float32", 1)
    prompt = harness.prompt(90)
    ours = logits(model, cache_for(model), [(prompt, Span(0, 90, tuple(range(23))))])
    torch.testing.assert_close(ours, reference(folder, prompt), rtol=1e-4, atol=1e-4)


def test_bfloat16_is_as_close_as_bfloat16_allows(tiny_folder: Path, harness: Harness) -> None:
    model = load_model(tiny_folder, "bfloat16", 1)
    prompt = harness.prompt(40)
    ours = logits(model, cache_for(model), [(prompt, Span(0, 40, tuple(range(10))))]).float()
    exact = reference(tiny_folder, prompt)
    theirs = reference(tiny_folder, prompt, torch.bfloat16).float()
    assert (ours - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()


def test_chunks_and_decodes_see_their_prefix(tiny: Model, tiny_folder: Path, harness: Harness) -> None:
    prompt, pages = harness.prompt(30), (7, 3, 9, 1, 0, 12, 5, 2)
    cache, rows = cache_for(tiny), []
    for start, count in ((0, 6), (6, 1), (7, 13), (20, 9), (29, 1)):
        rows.append(logits(tiny, cache, [(prompt[start : start + count], Span(start, count, pages))]))
    torch.testing.assert_close(torch.cat(rows), reference(tiny_folder, prompt), rtol=1e-4, atol=1e-4)


def test_a_mixed_step_equals_each_sequence_alone(tiny: Model, harness: Harness) -> None:
    lengths = (101, 40, 39, 9, 1)  # far enough apart for more than one decode group
    prompts = [harness.prompt(length, seed) for seed, length in enumerate(lengths)]
    pages = [tuple(range(26 * index, 26 * index + 26)) for index in range(7)]
    cache = cache_for(tiny, pages=26 * 7)
    for prompt, table in zip(prompts, pages, strict=False):
        logits(tiny, cache, [(prompt, Span(0, len(prompt), table))])
    parts = [([5 + index], Span(lengths[index], 1, pages[index])) for index in range(5)]
    first, second = harness.prompt(11, 8), harness.prompt(20, 9)
    logits(tiny, cache, [(second[:8], Span(0, 8, pages[6]))])
    parts += [(first, Span(0, 11, pages[5])), (second[8:], Span(8, 12, pages[6]))]
    together = logits(tiny, cache, parts)
    wanted = [[*prompt, 5 + index] for index, prompt in enumerate(prompts)]
    alone = [logits(tiny, cache_for(tiny), [(row, Span(0, len(row), pages[0]))]) for row in (*wanted, first, second)]
    expected = torch.cat([*(rows[-1:] for rows in alone[:5]), alone[5], alone[6][8:]])
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)


def test_layers_are_announced_in_order_with_their_kv_in_place(tiny: Model, harness: Harness) -> None:
    prompt, cache = harness.prompt(8), cache_for(tiny)
    span = Span(0, 8, (1, 0))
    attention = tiny.ops.plan([], [span], PAGE)
    batch = Batch(torch.tensor(prompt), torch.arange(8), torch.tensor([7]), attention)
    seen: list[tuple[int, torch.Tensor]] = []
    tiny.forward(batch, cache, lambda layer: seen.append((layer, cache.gather(layer, (1, 0), 0, 8)[0])))
    assert [layer for layer, _ in seen] == [0, 1, 2]
    for layer, keys in seen:
        assert keys.abs().sum(dim=(1, 2)).min() > 0
        assert torch.equal(keys, cache.gather(layer, (1, 0), 0, 8)[0])
