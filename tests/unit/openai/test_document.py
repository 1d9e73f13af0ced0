"""The served OpenAPI document against the server: schemathesis sends what it allows and what it forbids."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance

from router.openai import document

if TYPE_CHECKING:
    from tests.unit.openai.conftest import Server, ServerFactory

EXAMPLES = 25  # of each operation
CONTEXT = 48
# Limits across fields and those of the model (max_tokens and the prompt share the context, ids are below the
# vocabulary, top_logprobs needs logprobs) are in the fields' descriptions, where no generator reads them.
BEYOND_A_SCHEMA = [positive_data_acceptance, not_a_server_error]  # a budget of 1 ms ends with 504, which is no defect


@pytest.fixture(scope="module")
def tiny_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's tokenizer on a random model that is so small that its steps cost nothing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "model"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    vocab_size = json.loads((model_folder / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_server(start_server: ServerFactory, tiny_folder: Path) -> Iterator[Server]:
    with start_server(tiny_folder, max_context=CONTEXT, max_request_bytes=4 << 20) as server:
        yield server
        server.wait_idle()


schema = schemathesis.openapi.from_dict(document.document())


@schema.parametrize()
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_operation_keeps_to_the_document(case: schemathesis.Case, tiny_server: Server) -> None:
    response = case.call(base_url=tiny_server.url, timeout=30)
    assert response.status_code not in {500, 503}, response.text
    case.validate_response(response, excluded_checks=BEYOND_A_SCHEMA)


def test_the_document_is_served(tiny_server: Server) -> None:
    assert tiny_server.http.get("/openapi.json").json() == document.document()
