"""Greedy tokens of the embedded model equal those of transformers' own generate, in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from baton.request import Sampling
from engine.model import Model

if TYPE_CHECKING:
    from engine.text import Tokenizer
    from tests.unit.engine.conftest import Harness

OUTPUTS = 24
PROMPTS = {
    "chat": "What is the capital of France, and why is it famous?",
    "code": "def fibonacci(n):\n    ",
    "chinese": "今天天气很好，我们去",
    "emoji": "I love 🍕 and 🎉 because",
    "digits": "1 1 2 3 5 8 13 21",
    "one token": "A",
    "long": "The history of the sea is a history of storms and of the people who sailed. " * 25,
}


@pytest.fixture(scope="module")
def encoded(tokenizer: Tokenizer) -> dict[str, list[int]]:
    encoded = {name: tokenizer.encode(text) for name, text in PROMPTS.items()}
    encoded["chat"] = tokenizer.chat([("user", PROMPTS["chat"])])
    assert len(encoded["one token"]) == 1
    assert len(encoded["long"]) > 400
    return encoded


@pytest.fixture(scope="module")
def expected(model_folder: Path, encoded: dict[str, list[int]]) -> dict[str, list[int]]:
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    return {name: generate(theirs, prompt) for name, prompt in encoded.items()}


def generate(theirs: Any, prompt: Sequence[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=OUTPUTS, do_sample=False)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.fixture
def sampling(smollm: Model) -> Sampling:
    return Sampling(temperature=0.0, max_tokens=OUTPUTS, eos_token_ids=smollm.spec.eos_token_ids)


def test_spec_of_the_embedded_model(smollm: Model) -> None:
    spec = smollm.spec
    assert (spec.layers, spec.heads, spec.kv_heads, spec.head_dim, spec.hidden) == (30, 9, 3, 64, 576)
    assert (spec.norm_eps, spec.rope_theta, spec.max_context, spec.tied_head) == (1e-5, 100000.0, 8192, True)
    assert 2 in spec.eos_token_ids  # <|im_end|>


def test_all_prompts_together_in_chunks(
    smollm: Model,
    harness: Harness,
    encoded: dict[str, list[int]],
    expected: dict[str, list[int]],
    sampling: Sampling,
) -> None:
    engine = harness.engine(smollm, page_tokens=16, pages=128, step_tokens=100)
    for name, prompt in encoded.items():
        engine.add(harness.work(name, prompt, sampling))
    events = harness.run(engine)
    assert {name: harness.tokens(events[name]) for name in encoded} == expected
    assert events["chat"][-1].finish in ("stop", "length")


def test_alone_in_one_step(
    smollm: Model, harness: Harness, encoded: dict[str, list[int]], expected: dict[str, list[int]], sampling: Sampling
) -> None:
    for name in ("one token", "chinese"):
        work = harness.work(name, encoded[name], sampling)
        assert harness.alone(smollm, work, page_tokens=16, step_tokens=512) == expected[name]


def test_a_turn_ends_with_im_end(smollm: Model, harness: Harness, tokenizer: Tokenizer, sampling: Sampling) -> None:
    prompt = tokenizer.chat([("user", "Say only the word: hello")])
    engine = harness.engine(smollm, page_tokens=16)
    engine.add(harness.work("a", prompt, dataclasses.replace(sampling, max_tokens=60)))
    events = harness.run(engine)["a"]
    assert (events[-1].token, events[-1].finish) == (2, "stop")
