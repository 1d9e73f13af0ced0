"""A GGUF file of the Llama family to a Hugging Face folder in bf16: config, weights, tokenizer, chat template."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from baton.errors import ConfigError

VERSION = 1  # raised whenever the folders written here change: old ones in the cache are then made anew
SHARD_BYTES = 2 << 30

# Special tokens that end a turn or a document in the chat formats of this family, beside the ones the file names.
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>")
_CONTROL = 3  # token type of special tokens in GGUF

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def convert(file: Path, folder: Path, report: Callable[[str, float], None]) -> None:
    """Writes ``file``'s model to the empty ``folder``.

    Raises :class:`baton.errors.ConfigError` for a file that is broken or of another family.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:
        raise ConfigError(f"{file} is not a readable GGUF file: {error}", field="model.id") from None
    facts = {name: item.contents() for name, item in reader.fields.items()}
    if facts.get("general.architecture") != "llama":
        raise ConfigError(f"{file} is a {facts.get('general.architecture')!r}, supported: 'llama'", field="model.id")
    try:
        config = _config(facts, {tensor.name for tensor in reader.tensors})
    except KeyError as error:
        raise ConfigError(f"{file} lacks {error.args[0]}", field="model.id") from None
    config |= _rope_scaling(reader, config)
    ends = _end_tokens(facts)
    config |= {"bos_token_id": facts.get("tokenizer.ggml.bos_token_id"), "eos_token_id": ends}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id")})
    _write_weights(reader, config, folder, report)
    report("converting the tokenizer", 1.0)
    _write_tokenizer(file, facts, config, folder)


def _config(facts: Mapping[str, Any], tensors: set[str]) -> dict[str, Any]:
    hidden, heads = facts["llama.embedding_length"], facts["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": facts.get("llama.vocab_size") or len(facts["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts.get("llama.attention.head_count_kv", heads),
        "head_dim": facts.get("llama.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(facts.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def _rope_scaling(reader: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's scaling, which GGUF holds as one divisor per frequency; nothing when the file has none."""
    divisors = next((np.array(t.data, dtype=np.float64) for t in reader.tensors if t.name == "rope_freqs.weight"), None)
    if divisors is None:
        return {}
    scaling = {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original = 8192
    exponents = np.arange(0, config["head_dim"], 2) / config["head_dim"]
    turns = original / (2 * np.pi * config["rope_theta"] ** exponents)
    kept = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    if not np.allclose(1.0 / divisors, kept + (1.0 - kept) / scaling["factor"], rtol=1e-3):
        raise ConfigError("rope_freqs.weight is no scaling of Llama 3", field="model.id")
    return {"rope_scaling": scaling | {"original_max_position_embeddings": original}}


def _end_tokens(facts: Mapping[str, Any]) -> list[int]:
    names = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    named = {int(facts[name]) for name in names if name in facts}
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    known = {index for index, kind in enumerate(kinds) if kind == _CONTROL and tokens[index] in END_TOKENS}
    return sorted(named | known)


def _write_weights(reader: Any, config: Mapping[str, Any], folder: Path, report: Callable[[str, float], None]) -> None:
    shard: dict[str, torch.Tensor] = {}
    shards = shard_bytes = 0
    for name, tensor in _converted(reader, config, report):
        if shard_bytes + tensor.nbytes > SHARD_BYTES and shard:
            shards += 1
            _save(shard, folder / f"model-{shards:05d}.safetensors")
            shard, shard_bytes = {}, 0
        shard[name] = tensor
        shard_bytes += tensor.nbytes
    name = f"model-{shards + 1:05d}.safetensors" if shards else "model.safetensors"
    _save(shard, folder / name)
    if shards:
        _write_index(folder)


def _save(shard: dict[str, torch.Tensor], path: Path) -> None:
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes for its owner only; a cache may be shared


def _write_index(folder: Path) -> None:
    """The map from tensors to files that other readers of a sharded folder expect."""
    from safetensors import safe_open

    places: dict[str, str] = {}
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        total += os.path.getsize(file)
        with safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), file.name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    _write_json(folder / "model.safetensors.index.json", index)


def _converted(
    reader: Any, config: Mapping[str, Any], report: Callable[[str, float], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    from gguf import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for index, tensor in enumerate(reader.tensors):
        report("converting the weights", index / len(reader.tensors))
        if tensor.name == "rope_freqs.weight":
            continue
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        name, kind = _name(tensor.name)
        if kind in heads:
            values = _half_split(values, heads[kind])
        yield name, torch.from_numpy(np.require(values, requirements=["C", "W"])).to(torch.bfloat16)


def _name(name: str) -> tuple[str, str]:
    """A tensor's Hugging Face name, and its kind within a layer (empty outside the layers)."""
    if name in _TOP_TENSORS:
        return _TOP_TENSORS[name], ""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_TENSORS and parts[3] == "weight":
        return f"model.layers.{int(parts[1])}.{_LAYER_TENSORS[parts[2]]}.weight", parts[2]
    raise ConfigError(f"tensor {name} belongs to no plain Llama model", field="model.id")


def _half_split(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rotary rows from GGUF's order (pairs side by side) to Hugging Face's (first halves, then second halves)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(file: Path, facts: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.model_max_length = config["max_position_embeddings"]
    if template := facts.get("tokenizer.chat_template"):
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if facts.get("tokenizer.ggml.pre") == "smollm":
        _split_digits(folder / "tokenizer.json")


def _split_digits(path: Path) -> None:
    """SmolLM cuts numbers into digits before BPE, which transformers' GGUF reader leaves out."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tokenizer["pre_tokenizer"]]}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")
