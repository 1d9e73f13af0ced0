"""Configs that are read, and configs that are refused by the name of their key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baton.errors import ConfigError
from engine.spec import LinearRope, Llama3Rope, ModelSpec

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}


def spec(folder: Path, generation: dict[str, Any] | None = None, **changes: Any) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(BASE | changes))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelSpec.from_folder(folder)


def test_defaults_follow_hugging_face(tmp_path: Path) -> None:
    read = spec(tmp_path)
    assert (read.kv_heads, read.head_dim, read.norm_eps, read.rope_theta) == (4, 16, 1e-6, 10000.0)
    assert (read.tied_head, read.bos_token_id, read.eos_token_ids, read.rope_scaling) == (False, None, (), None)


def test_end_tokens_are_the_union_of_both_files(tmp_path: Path) -> None:
    read = spec(tmp_path, {"eos_token_id": [9, 7]}, eos_token_id=8, bos_token_id=1)
    assert (read.eos_token_ids, read.bos_token_id) == ((7, 8, 9), 1)


@pytest.mark.parametrize(
    ("changes", "scaling", "theta"),
    [
        ({"rope_theta": 5e5}, None, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, None, 2e4),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, LinearRope(2.0), 1e4),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, Llama3Rope(8.0, 1.0, 4.0, 128), 1e4),
    ],
)
def test_rope_in_old_and_new_form(tmp_path: Path, changes: dict[str, Any], scaling: object, theta: float) -> None:
    read = spec(tmp_path, **changes)
    assert (read.rope_scaling, read.rope_theta) == (scaling, theta)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling"),
    ],
)
def test_what_we_cannot_run_is_refused_by_key(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        spec(tmp_path, **changes)
    assert refused.value.field == key


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_unreadable_configs(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelSpec.from_folder(tmp_path)
