"""Configs that are read, and configs that are refused by the name of their key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baton.errors import ConfigError
from engine.spec import DynamicRope, LinearRope, Llama3Rope, ModelSpec, YarnRope

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
SLIDING, FULL = "sliding_attention", "full_attention"
QWEN_WINDOW = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}
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
    assert (read.qkv_bias, read.out_bias, read.mlp_bias, read.qk_norm, read.windows) == (False, False, False, False, ())
    with_kv: dict[str, Any] = {"num_key_value_heads": 2}
    assert spec(tmp_path, model_type="qwen3", **with_kv).head_dim == 128
    assert spec(tmp_path, model_type="mistral", max_position_embeddings=8192, num_attention_heads=8).kv_heads == 8
    assert spec(tmp_path, model_type="mistral", max_position_embeddings=8192, **with_kv).window(0) == 4096
    assert (
        spec(tmp_path, model_type="mistral", max_position_embeddings=8192, sliding_window=None, **with_kv).windows == ()
    )


def test_end_tokens_are_the_union_of_both_files(tmp_path: Path) -> None:
    read = spec(tmp_path, {"eos_token_id": [9, 7]}, eos_token_id=8, bos_token_id=1)
    assert (read.eos_token_ids, read.bos_token_id) == ((7, 8, 9), 1)


@pytest.mark.parametrize(
    ("changes", "scaling", "theta"),
    [
        ({"rope_theta": 5e5}, None, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, None, 2e4),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, LinearRope(2.0), 1e4),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, DynamicRope(4.0), 1e4),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, Llama3Rope(8.0, 1.0, 4.0, 128), 1e4),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": None}},
         Llama3Rope(8.0, 1.0, 4.0, 512), 1e4),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}, "rope_theta": 7.0},
         LinearRope(2.0), 5.0),
        ({"rope_scaling": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128}},
         YarnRope(4.0, 128, 1.1386294361119891, 32.0, 1.0, True), 1e4),
        ({"rope_scaling": {"type": "yarn", "factor": 1.0}}, YarnRope(1.0, 512, 1.0, 32.0, 1.0, True), 1e4),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
                              "attention_factor": 0.5, "beta_fast": 16, "beta_slow": 2, "truncate": False}},
         YarnRope(4.0, 128, 0.5, 16.0, 2.0, False), 1e4),
    ],
)  # fmt: skip
def test_rope_in_old_and_new_form(tmp_path: Path, changes: dict[str, Any], scaling: object, theta: float) -> None:
    read = spec(tmp_path, **changes)
    assert (read.rope_scaling, read.rope_theta) == (scaling, theta)


def test_yarn_reaches_as_far_as_it_stretches(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert spec(tmp_path, rope_scaling=yarn).max_context == 2048
    assert spec(tmp_path, rope_scaling=yarn, max_position_embeddings=4096).max_context == 4096
    assert spec(tmp_path, rope_scaling={"rope_type": "linear", "factor": 4.0}).max_context == 512


@pytest.mark.parametrize(
    ("family", "changes", "biases"),
    [
        ("llama", {"attention_bias": True}, (True, True, False)),
        ("llama", {"mlp_bias": True}, (False, False, True)),
        ("qwen2", {}, (True, False, False)),
        ("qwen2", {"attention_bias": True}, (True, False, False)),  # transformers' class does not look at it
        ("qwen3", {}, (False, False, False)),
        ("qwen3", {"attention_bias": True}, (True, True, False)),
        ("mistral", {"attention_bias": False}, (False, False, False)),
    ],
)
def test_biases_of_each_family(tmp_path: Path, family: str, changes: dict[str, Any], biases: object) -> None:
    read = spec(tmp_path, model_type=family, num_key_value_heads=4, **changes)
    assert (read.qkv_bias, read.out_bias, read.mlp_bias) == biases
    assert read.qk_norm == (family == "qwen3")


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "llama"}, ()),
        ({"model_type": "mistral", "sliding_window": 64}, (64, 64)),
        ({"model_type": "mistral", "sliding_window": 64, "layer_types": [SLIDING, SLIDING]}, (64, 64)),
        ({"model_type": "mistral", "sliding_window": 512}, ()),  # as long as the context: it never hides a key
        ({"model_type": "ministral", "sliding_window": 64}, (64, 64)),
        ({"model_type": "ministral", "sliding_window": 64, "layer_types": [FULL, SLIDING]}, (None, 64)),
        (QWEN_WINDOW | {"use_sliding_window": False}, ()),
        (QWEN_WINDOW | {"sliding_window": None}, ()),
        (QWEN_WINDOW | {"max_window_layers": 1}, (None, 64)),
        (QWEN_WINDOW | {"max_window_layers": 2}, ()),
        (QWEN_WINDOW, ()),  # from layer 28 on, by default
        (QWEN_WINDOW | {"max_window_layers": 1, "layer_types": [SLIDING, FULL]}, (64, None)),
        (QWEN_WINDOW | {"model_type": "qwen3", "max_window_layers": 0}, (64, 64)),
    ],
)
def test_windows_by_layer(tmp_path: Path, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    read = spec(tmp_path, num_key_value_heads=2, **changes)
    assert read.windows == windows
    assert [read.window(layer) for layer in range(2)] == list(windows or (None, None))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "mixtral"}, "model_type"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 64}, "sliding_window"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"model_type": "mistral", "sliding_window": 0, "num_key_value_heads": 4}, "sliding_window"),
        (QWEN_WINDOW | {"num_key_value_heads": 4, "max_window_layers": None}, "max_window_layers"),
        (QWEN_WINDOW | {"num_key_value_heads": 4, "layer_types": [SLIDING]}, "layer_types"),
        (QWEN_WINDOW | {"num_key_value_heads": 4, "layer_types": [SLIDING, "chunked_attention"]}, "layer_types"),
        ({"model_type": "qwen2", "num_key_value_heads": 4, "layer_types": [SLIDING, FULL]}, "layer_types"),
        (
            {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 8, "layer_types": [SLIDING, FULL]},
            "layer_types",
        ),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {FULL: {"rope_type": "default"}}}, "rope_parameters"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 0}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": []}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": True}}, "beta_fast"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1.5}},
            "original_max_position_embeddings",
        ),
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
