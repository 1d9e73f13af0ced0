"""The tokenizer against transformers' own, and what it says about the model."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from baton.errors import InvalidRequest
from engine.text import Tokenizer

TEXTS = [
    "Hello, world!",
    "  leading and trailing  ",
    "def f(x):\n\treturn x ** 2\n",
    "你好，世界！今天天气怎么样？",
    "👩‍👩‍👧‍👦 🙂🏳️‍🌈",
    "<|im_start|>user\nspecial tokens in text<|im_end|>",
    "a" * 1000,
    "",
]


@pytest.fixture(scope="module")
def reference(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(model_folder))


@pytest.mark.parametrize("text", TEXTS)
def test_encode_equals_transformers(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    assert tokenizer.encode(text) == reference(text)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_decode_equals_transformers(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    ids = reference(text)["input_ids"]
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "messages",
    [
        [("user", "What is 2 + 2?")],
        [("system", "Answer in French."), ("user", "你好 🙂"), ("assistant", "Salut"), ("user", "")],
    ],
)
def test_chat_equals_transformers(tokenizer: Tokenizer, reference: Any, messages: list[tuple[str, str]]) -> None:
    turns = [{"role": role, "content": content} for role, content in messages]
    expected = reference.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert tokenizer.chat(messages) == expected


def test_a_tokenizer_that_adds_special_tokens_adds_them_to_text_only(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    stored = json.loads((folder / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer, reference = Tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    assert tokenizer.encode("hi")[0] == 1
    assert tokenizer.encode("hi") == reference("hi")["input_ids"]
    chat = tokenizer.chat([("user", "hi")])
    assert chat.count(1) == 3  # system, user and assistant: the template's own
    expected = reference.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=True
    )
    assert chat == expected["input_ids"]


def test_many_threads_encode_alike(tokenizer: Tokenizer) -> None:
    texts = [f"{index} " + "long text with 漢字 🙂 " * 200 for index in range(64)]
    alone = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts, timeout=60)) == alone


def test_end_of_turn_tokens_are_the_union_of_all_sources(tokenizer: Tokenizer, model_folder: Path) -> None:
    names = {tokenizer.token_text(token) for token in tokenizer.eos_token_ids}
    assert names == {"<|im_end|>", "<|endoftext|>"}


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": [7, 2]}, (2, 5, 7)),
        ({"eos_token_id": None}, None, (2,)),
        (None, {}, (2,)),
    ],
)
def test_end_of_turn_sources(
    byte_fallback_folder: Path, tmp_path: Path, config: Any, generation: Any, expected: tuple[int, ...]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(byte_fallback_folder, folder)
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    assert Tokenizer(folder).eos_token_ids == expected


def test_vocabulary_is_the_models_embedding(byte_fallback_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(byte_fallback_folder, folder)
    bare = Tokenizer(folder).vocab_size
    (folder / "config.json").write_text(json.dumps({"vocab_size": bare + 50}))
    padded = Tokenizer(folder)
    assert padded.vocab_size == bare + 50
    assert padded.decode([bare + 49]) == ""
    assert not padded.is_visible(bare + 49)


def test_no_token_is_longer_than_promised(tokenizer: Tokenizer) -> None:
    longest = max(len(tokenizer.token_text(token)) for token in range(tokenizer.vocab_size))
    assert longest <= tokenizer.max_token_chars < 200


def test_a_model_without_chat_template_refuses_chat(byte_fallback: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="no chat template") as caught:
        byte_fallback.chat([("user", "hi")])
    assert caught.value.field == "chat"


def test_a_template_that_raises_is_the_clients_error(byte_fallback_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(byte_fallback_folder, folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        Tokenizer(folder).chat([("user", "hi")])
    assert caught.value.field == "chat.messages"


def test_special_tokens_are_not_visible(tokenizer: Tokenizer) -> None:
    assert not tokenizer.is_visible(tokenizer.eos_token_ids[0])
    assert tokenizer.is_visible(tokenizer.encode("hello")[0])
    assert not tokenizer.is_visible(-1)


def test_byte_tokens_exist_only_where_the_decoder_knows_them(tokenizer: Tokenizer, byte_fallback: Tokenizer) -> None:
    assert byte_fallback.is_byte(3)
    assert not byte_fallback.is_byte(2)
    assert not any(tokenizer.is_byte(token) for token in range(tokenizer.vocab_size))


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_a_texts_tokens_are_its_own(tokenizer: Tokenizer, text: str) -> None:
    assert b"".join(tokenizer.token_bytes(token) for token in tokenizer.encode(text)) == text.encode()


@pytest.mark.parametrize("text", ["ab a", "你 b", "é🙂"])
def test_the_bytes_of_byte_tokens(byte_fallback: Tokenizer, text: str) -> None:
    """This tokenizer puts a space before every text, and drops it in decoding."""
    ids = [token for token in byte_fallback.encode(text) if byte_fallback.is_visible(token)]
    assert b"".join(byte_fallback.token_bytes(token) for token in ids) == f" {text}".encode()


def test_an_id_without_a_token_has_no_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(10**6) == b""
