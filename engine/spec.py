"""What our transformer must know of a model, read from its Hugging Face config; what it cannot run is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import ConfigError

# What transformers' own class takes for a key that the file leaves out, where it is not the same for all families.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "ministral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
}
KNOWN_BY: Mapping[str, tuple[str, ...]] = {
    "attention_bias": ("llama", "qwen2", "qwen3"),
    "mlp_bias": ("llama",),
    "sliding_window": ("mistral", "ministral", "qwen2", "qwen3"),
    "rope_interleaved": (),
}
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True)
class LinearRope:
    """Positions divided by ``factor``."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicRope:
    """NTK scaling that grows with the sequence once it is longer than ``max_context``, and is none before."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Rope:
    """Llama 3.1: low frequencies divided by ``factor``, high ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True, slots=True)
class YarnRope:
    """YaRN (arXiv:2309.00071): as Llama 3.1 with the ramp along dimensions; queries and keys grow by a factor each."""

    factor: float
    original_context: int
    attention_factor: float
    beta_fast: float  # turns over the original context above which a frequency is kept
    beta_slow: float  # and below which it is divided by ``factor``
    whole_dimensions: bool  # the ramp's ends are rounded outwards


RopeScaling = LinearRope | DynamicRope | Llama3Rope | YarnRope | None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder of the Llama family: pre-norm, rotary positions, grouped-query attention, gated SiLU."""

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
    qkv_bias: bool = False
    out_bias: bool = False  # of attention's output matrix
    mlp_bias: bool = False  # of gate, up and down
    qk_norm: bool = False  # RMSNorm of every query and key head before it is rotated, with ``norm_eps``
    windows: tuple[int | None, ...] = ()  # one per layer, as :meth:`window` says; empty when no layer has one

    def window(self, layer: int) -> int | None:
        """How many of the newest keys a query of ``layer`` sees, its own included; None when it sees all."""
        return self.windows[layer] if self.windows else None

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelSpec:
        """Reads ``config.json`` and ``generation_config.json``. Raises :class:`ConfigError` naming the key."""
        config = _read(Path(folder) / "config.json")
        generation_path = Path(folder) / "generation_config.json"
        generation = _read(generation_path) if generation_path.exists() else {}
        _refuse_unsupported(config)
        family = str(config["model_type"])
        config = {**DEFAULTS[family], **config}
        heads, hidden = _positive(config, "num_attention_heads"), _positive(config, "hidden_size")
        kv_heads = _positive(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise ConfigError(f"{kv_heads} does not divide the {heads} attention heads", field="num_key_value_heads")
        head_dim = _positive(config, "head_dim", hidden // heads)
        if head_dim % 2:
            raise ConfigError(f"is {head_dim}, rotary positions need an even number", field="head_dim")
        rope = _rope_parameters(config)
        scaling = _rope_scaling(rope, _positive(config, "max_position_embeddings"))
        layers, max_context = _positive(config, "num_hidden_layers"), _max_context(config, scaling)
        attention_bias = bool(config.get("attention_bias", False))
        return cls(
            vocab_size=_positive(config, "vocab_size"),
            hidden=hidden,
            intermediate=_positive(config, "intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            norm_eps=_number(config, "rms_norm_eps", 1e-6),
            rope_theta=_number(rope, "rope_theta", _number(config, "rope_theta", 10000.0)),
            rope_scaling=scaling,
            tied_head=bool(config.get("tie_word_embeddings", False)),
            max_context=max_context,
            bos_token_id=next(iter(_ids(config.get("bos_token_id"))), None),
            eos_token_ids=tuple(sorted(_ids(config.get("eos_token_id")) | _ids(generation.get("eos_token_id")))),
            qkv_bias=attention_bias or family == "qwen2",
            out_bias=attention_bias and family != "qwen2",
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            windows=_windows(config, family, layers, max_context),
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
    family = config.get("model_type")
    if family not in DEFAULTS:
        raise ConfigError(f"is {family!r}, supported: {', '.join(DEFAULTS)}", field="model_type")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError(f"is {config['hidden_act']!r}, supported: 'silu'", field="hidden_act")
    # Keys that transformers' classes of the other families ignore: a file that sets them was made for other code.
    for key, families in KNOWN_BY.items():
        if config.get(key) and family not in families:
            raise ConfigError(f"is {config[key]!r}, which no {family} has", field=key)
    if config.get("quantization_config"):
        raise ConfigError("quantized weights are not supported", field="quantization_config")


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        raise ConfigError(f"is {value!r}, expected a positive integer", field=key)
    return value


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ConfigError(f"is {value!r}, expected a positive number", field=key)
    return float(value)


def _windows(config: Mapping[str, Any], family: str, layers: int, max_context: int) -> tuple[int | None, ...]:
    """One window per layer; nothing when none is shorter than the context."""
    switched_off = family.startswith("qwen") and not config.get("use_sliding_window", False)
    if switched_off or config.get("sliding_window") is None:
        if SLIDING in (config.get("layer_types") or ()):
            raise ConfigError(f"names {SLIDING}, but no sliding_window is in use", field="layer_types")
        return ()
    window = _positive(config, "sliding_window")
    kinds = _layer_types(config, family, layers)
    windows = tuple(window if kind == SLIDING and window < max_context else None for kind in kinds)
    return windows if any(windows) else ()


def _layer_types(config: Mapping[str, Any], family: str, layers: int) -> list[str]:
    kinds = config.get("layer_types")
    if kinds is None:
        first = config["max_window_layers"] if family.startswith("qwen") else 0
        if type(first) is not int:
            raise ConfigError(f"is {first!r}, expected a whole number", field="max_window_layers")
        return [SLIDING if layer >= first else FULL for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {SLIDING, FULL}:
        raise ConfigError(f"must name {SLIDING} or {FULL} for each of {layers} layers", field="layer_types")
    if family == "mistral" and FULL in kinds:
        raise ConfigError("a mistral slides in every layer; model_type ministral mixes them", field="layer_types")
    return kinds


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` (transformers 5) or ``rope_scaling`` (before), flat."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key) or {}
        if not isinstance(value, dict) or any(isinstance(item, dict) for item in value.values()):
            raise ConfigError("must be one object for all layers", field=key)
        rope |= value
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ConfigError(f"is {partial!r}, supported: 1.0", field="partial_rotary_factor")
    return rope


def _rope_scaling(rope: Mapping[str, Any], positions: int) -> RopeScaling:
    """``positions``: max_position_embeddings, which is the original context unless the parameters name one."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    match kind:
        case "default":
            return None
        case "linear":
            return LinearRope(_needed(rope, kind, "factor"))
        case "dynamic":
            return DynamicRope(_needed(rope, kind, "factor"))
        case "llama3":
            factor, low, high = (_needed(rope, kind, f"{part}factor") for part in ("", "low_freq_", "high_freq_"))
            return Llama3Rope(factor, low, high, _original_context(rope, positions))
        case "yarn":
            return _yarn(rope, positions)
        case _:
            raise ConfigError(
                f"is {kind!r}, supported: default, linear, dynamic, llama3, yarn", field="rope_scaling.rope_type"
            )


def _needed(rope: Mapping[str, Any], kind: str, key: str) -> float:
    if rope.get(key) is None:
        raise ConfigError(f"{kind} scaling needs {key}", field="rope_scaling")
    return _number(rope, key, 1.0)


def _yarn(rope: Mapping[str, Any], positions: int) -> YarnRope:
    original = _original_context(rope, positions)
    factor = _number(rope, "factor", positions / original)
    attention = _magnitude(factor, 1.0)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        mscale, all_dims = _number(rope, "mscale", 1.0), _number(rope, "mscale_all_dim", 1.0)
        attention = _magnitude(factor, mscale) / _magnitude(factor, all_dims)
    return YarnRope(
        factor,
        original,
        attention_factor=_number(rope, "attention_factor", attention),
        beta_fast=_number(rope, "beta_fast", 32.0),
        beta_slow=_number(rope, "beta_slow", 1.0),
        whole_dimensions=bool(rope.get("truncate", True)),
    )


def _magnitude(factor: float, mscale: float) -> float:
    """How much queries and keys must grow for a softmax over ``factor`` times the tokens (section 3.4)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _original_context(rope: Mapping[str, Any], positions: int) -> int:
    return _positive(rope, "original_max_position_embeddings", positions)


def _max_context(config: Mapping[str, Any], scaling: RopeScaling) -> int:
    """Qwen's cards add YaRN to a config whose max_position_embeddings stays at the original context."""
    positions = _positive(config, "max_position_embeddings")
    return (
        max(positions, int(scaling.factor * scaling.original_context)) if isinstance(scaling, YarnRope) else positions
    )


def _ids(value: Any) -> set[int]:
    """Token ids from a config value that is absent, one id or a list of them."""
    return set() if value is None else {int(item) for item in (value if isinstance(value, list) else [value])}
