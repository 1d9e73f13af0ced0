"""What our transformer must know of a model, read from its Hugging Face config; what it cannot run is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import ConfigError

MODEL_TYPES = ("llama", "mistral")


@dataclass(frozen=True, slots=True)
class LinearRope:
    """Positions divided by ``factor``."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Llama 3.1: low frequencies divided by ``factor``, high ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


RopeScaling = LinearRope | Llama3Rope | None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder of the Llama family: pre-norm, rotary positions, grouped-query attention, gated SiLU, no biases."""

    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    tied_head: bool
    max_context: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelSpec:
        """Reads ``config.json`` and ``generation_config.json``. Raises :class:`ConfigError` naming the key."""
        config = _read(Path(folder) / "config.json")
        generation_path = Path(folder) / "generation_config.json"
        generation = _read(generation_path) if generation_path.exists() else {}
        _refuse_unsupported(config)
        heads, hidden = _positive(config, "num_attention_heads"), _positive(config, "hidden_size")
        kv_heads = _positive(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise ConfigError(f"{kv_heads} does not divide the {heads} attention heads", field="num_key_value_heads")
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        return cls(
            vocab_size=_positive(config, "vocab_size"),
            hidden=hidden,
            intermediate=_positive(config, "intermediate_size"),
            layers=_positive(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=_positive(config, "head_dim", hidden // heads),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(rope),
            tied_head=bool(config.get("tie_word_embeddings", False)),
            max_context=_positive(config, "max_position_embeddings"),
            bos_token_id=next(iter(_ids(config.get("bos_token_id"))), None),
            eos_token_ids=tuple(sorted(_ids(config.get("eos_token_id")) | _ids(generation.get("eos_token_id")))),
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} has no {path.name}", field="model.id") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}", field="model.id") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} is not a JSON object", field="model.id")
    return tree


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(f"is {model_type!r}, supported: {', '.join(MODEL_TYPES)}", field="model_type")
    required = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None}
    for key, wanted in required.items():
        if config.get(key, wanted) != wanted:
            raise ConfigError(f"is {config[key]!r}, supported: {wanted!r}", field=key)
    if config.get("quantization_config"):
        raise ConfigError("quantized weights are not supported", field="quantization_config")


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        raise ConfigError(f"is {value!r}, expected a positive integer", field=key)
    return value


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling:
    kind = rope.get("rope_type", rope.get("type", "default"))
    try:
        match kind:
            case "default":
                return None
            case "linear":
                return LinearRope(float(rope["factor"]))
            case "llama3":
                low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
                return Llama3Rope(float(rope["factor"]), low, high, int(rope["original_max_position_embeddings"]))
            case _:
                raise ConfigError(f"is {kind!r}, supported: default, linear, llama3", field="rope_scaling.rope_type")
    except KeyError as error:
        raise ConfigError(f"{kind} scaling needs {error.args[0]}", field="rope_scaling") from None


def _ids(value: Any) -> set[int]:
    """Token ids from a config value that is absent, one id or a list of them."""
    return set() if value is None else {int(item) for item in (value if isinstance(value, list) else [value])}
