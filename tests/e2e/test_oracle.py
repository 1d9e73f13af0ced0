"""The disaggregated service answers with the tokens that transformers computes from the same weights, float32.

The oracle reads prompt and answer in one forward pass: by induction over the positions, an answer whose every token is
the most likely one after what stands before it is the greedy answer.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.wire import inference_pb2 as pb
from engine.text import Tokenizer

pytestmark = pytest.mark.ray

NEW_TOKENS = 64
STREAMS = 8
Prompts = list[tuple[str, dict[str, Any]]]
Oracle = Callable[[dict[str, Any], list[int]], list[int]]
GREEDY = {"temperature": 0.0, "max_tokens": NEW_TOKENS, "ignore_eos": True}


@pytest.fixture(scope="session")
def oracle(model_folder: Path, tokenizer: Tokenizer) -> Oracle:
    """What transformers' own class would say at every position of an answer; each answer is computed once."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    known: dict[tuple[int, ...], list[int]] = {}

    def greedy(fields: dict[str, Any], answer: list[int]) -> list[int]:
        ids = prompt_ids(tokenizer, fields)
        text = (*ids, *answer[:-1])
        if text not in known:
            with torch.inference_mode():
                logits = model(torch.tensor([text]), logits_to_keep=len(answer)).logits
            known[text] = logits[0].argmax(dim=-1).tolist()
        return known[text]

    return greedy


def prompt_ids(tokenizer: Tokenizer, fields: dict[str, Any]) -> list[int]:
    if "token_ids" in fields:
        return list(fields["token_ids"].ids)
    if "chat" in fields:
        return tokenizer.chat([(message.role, message.content) for message in fields["chat"].messages])
    return tokenizer.encode(fields["prompt"])


def answer_all(client: Any, prompts: Prompts, codec: str) -> dict[str, list[int]]:
    def one(item: tuple[str, dict[str, Any]]) -> tuple[str, list[int]]:
        name, fields = item
        answer = client.generate(**fields, sampling=pb.Sampling(**GREEDY), handoff=pb.Handoff(codec=codec))
        assert answer.ledger.codec == codec
        assert len(answer.tokens) == NEW_TOKENS
        return name, answer.tokens

    with ThreadPoolExecutor(STREAMS) as pool:
        return dict(pool.map(one, prompts))


@pytest.mark.parametrize(
    ("cluster", "codec"),
    [
        ("nixl_cluster", "lossless"),
        ("tcp_cluster", "raw"),
        pytest.param("nixl_cluster", "raw", marks=pytest.mark.slow),
        pytest.param("tcp_cluster", "lossless", marks=pytest.mark.slow),
    ],
)
def test_tokens_equal_transformers(
    cluster: str, codec: str, prompts: Prompts, oracle: Oracle, request: pytest.FixtureRequest
) -> None:
    assert len(prompts) >= 20
    client = request.getfixturevalue(cluster)
    answers = answer_all(client, prompts, codec)
    wrong = [name for name, fields in prompts if answers[name] != oracle(fields, answers[name])]
    assert not wrong
    client.wait_idle()


def test_the_oracle_can_tell_a_wrong_answer(prompts: Prompts, oracle: Oracle) -> None:
    _, fields = prompts[0]
    assert oracle(fields, [7] * NEW_TOKENS) != [7] * NEW_TOKENS


@pytest.mark.slow
def test_int8_stays_close(nixl_cluster: Any, prompts: Prompts, record_property: Callable[[str, object], None]) -> None:
    """A lossy codec may part ways with the exact answer; how often is reported, and most tokens agree."""
    exact, lossy = (answer_all(nixl_cluster, prompts, codec) for codec in ("lossless", "int8"))
    equal = sum(a == b for name in exact for a, b in zip(exact[name], lossy[name], strict=True))
    share = equal / (NEW_TOKENS * len(prompts))
    record_property("int8_equal_token_share", share)
    print(f"int8: {share:.1%} of tokens equal the exact answer's")
    assert share > 0.5
