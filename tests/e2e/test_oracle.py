"""The disaggregated service answers with the tokens that transformers computes from the same weights, float32."""

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
Prompts = list[tuple[str, dict[str, Any]]]
GREEDY = {"temperature": 0.0, "max_tokens": NEW_TOKENS, "ignore_eos": True}


@pytest.fixture(scope="session")
def oracle(model_folder: Path, prompts: Prompts) -> dict[str, list[int]]:
    """Greedy continuations by transformers' own class."""
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    torch.set_num_threads(2)
    answers = {}
    for name, fields in prompts:
        ids = _ids(tokenizer, fields)
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        answers[name] = out[0, len(ids) :].tolist()
    return answers


def _ids(tokenizer: Tokenizer, fields: dict[str, Any]) -> list[int]:
    if "token_ids" in fields:
        return list(fields["token_ids"].ids)
    if "chat" in fields:
        return list(tokenizer.chat([(message.role, message.content) for message in fields["chat"].messages]))
    return list(tokenizer.encode(fields["prompt"]))


def answer_all(client: Any, prompts: Prompts, codec: str) -> dict[str, list[int]]:
    def one(item: tuple[str, dict[str, Any]]) -> tuple[str, list[int]]:
        name, fields = item
        answer = client.generate(**fields, sampling=pb.Sampling(**GREEDY), handoff=pb.Handoff(codec=codec))
        assert answer.ledger.codec == codec
        return name, answer.tokens

    with ThreadPoolExecutor(8) as pool:
        return dict(pool.map(one, prompts))


@pytest.mark.parametrize("codec", ["raw", "lossless"])
@pytest.mark.parametrize("cluster", ["nixl_cluster", "tcp_cluster"])
def test_tokens_equal_transformers(
    cluster: str, codec: str, prompts: Prompts, oracle: dict[str, list[int]], request: pytest.FixtureRequest
) -> None:
    assert len(prompts) >= 20
    client = request.getfixturevalue(cluster)
    answers = answer_all(client, prompts, codec)
    wrong = [name for name, tokens in answers.items() if tokens != oracle[name]]
    assert not wrong
    client.wait_idle()


def test_int8_stays_close(
    nixl_cluster: Any,
    prompts: Prompts,
    oracle: dict[str, list[int]],
    record_property: Callable[[str, object], None],
) -> None:
    """A lossy codec may part ways with the oracle; how often is reported, and most tokens before that agree."""
    answers = answer_all(nixl_cluster, prompts, "int8")
    equal = sum(a == b for name, tokens in answers.items() for a, b in zip(tokens, oracle[name], strict=True))
    share = equal / (NEW_TOKENS * len(prompts))
    record_property("int8_equal_token_share", share)
    print(f"int8: {share:.1%} of tokens equal the oracle's")
    assert share > 0.5
