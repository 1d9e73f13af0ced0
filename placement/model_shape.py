"""The sizes of a decoder transformer that decide what it costs, from a Hugging Face config or a built-in name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from baton.errors import ConfigError

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder: per layer Q, K, V, output and MLP matrices, and a vocabulary head."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    gated: bool = True  # the MLP has a gate matrix (Llama) or not (OPT)
    tied_head: bool = False
    dtype: str = "bfloat16"  # of weights, activations and KV

    def __post_init__(self) -> None:
        for key in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab"):
            if getattr(self, key) < 1:
                raise ConfigError(f"is {getattr(self, key)}, expected at least 1", field=f"model.{key}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.kv_heads} does not divide {self.heads} heads", field="model.kv_heads")
        if self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"is {self.dtype!r}, allowed: {', '.join(DTYPE_BYTES)}", field="model.dtype")

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def layer_parameters(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + self.hidden * self.intermediate * (3 if self.gated else 2)

    @property
    def parameters(self) -> int:
        """Matrices only: norms and biases are below a thousandth."""
        return self.layers * self.layer_parameters + self.vocab * self.hidden * (1 if self.tied_head else 2)

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.dtype_bytes

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one token's K and V over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes

    def rank_kv_token_bytes(self, tp: int) -> int:
        """The same on one of ``tp`` ranks: KV heads are split, and copied once there are more ranks than heads."""
        return 2 * self.layers * max(1, self.kv_heads // tp) * self.head_dim * self.dtype_bytes

    def allows(self, tp: int, pp: int) -> bool:
        """Heads split evenly over ``tp`` ranks (KV heads split or copied evenly) and layers fill ``pp`` stages."""
        kv_fits = self.kv_heads % tp == 0 or tp % self.kv_heads == 0
        even = self.heads % tp == 0 and self.intermediate % tp == 0 and kv_fits
        return tp >= 1 and 1 <= pp <= self.layers and even

    @classmethod
    def load(cls, source: str | Path, dtype: str = "") -> ModelShape:
        """From a built-in name, a config.json or the folder it lies in; ``dtype`` overrides. Raises ConfigError."""
        built_in = BUILT_IN.get(str(source).lower())
        shape = built_in if built_in is not None else cls.from_config(_read(Path(source)), name=Path(source).stem)
        return replace(shape, dtype=dtype) if dtype else shape

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str) -> ModelShape:
        """From a Hugging Face config of the Llama family or OPT."""
        opt = config.get("model_type") == "opt"
        heads, hidden = _count(config, "num_attention_heads"), _count(config, "hidden_size")
        return cls(
            name=str(config.get("_name_or_path") or name),
            layers=_count(config, "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=_count(config, "num_key_value_heads", heads),
            head_dim=_count(config, "head_dim", hidden // heads),
            intermediate=_count(config, "ffn_dim" if opt else "intermediate_size"),
            vocab=_count(config, "vocab_size"),
            gated=not opt,
            tied_head=bool(config.get("tie_word_embeddings", opt)),
            dtype=str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"),
        )


BUILT_IN: Mapping[str, ModelShape] = {
    "llama-3.1-8b": ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
    "llama-3.1-70b": ModelShape("llama-3.1-70b", 80, 8192, 64, 8, 128, 28672, 128256),
    "opt-13b": ModelShape("opt-13b", 40, 5120, 40, 40, 128, 20480, 50272, gated=False, tied_head=True, dtype="float16"),
    "smollm2-135m-instruct": ModelShape("smollm2-135m-instruct", 30, 576, 9, 3, 64, 1536, 49152, tied_head=True),
}


def _read(path: Path) -> Mapping[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        allowed = f"a config.json, its folder, or one of {', '.join(BUILT_IN)}"
        raise ConfigError(f"cannot read {file} ({error}); expected {allowed}", field="model") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} is not a JSON object", field="model")
    return tree


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        raise ConfigError(f"is {value!r}, expected a positive integer", field=f"model.{key}")
    return value
