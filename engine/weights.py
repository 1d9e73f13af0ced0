"""Safetensors into parameters, one tensor at a time: a load never needs a second copy of the model."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from baton.errors import ConfigError
from baton.layout import DTYPES, Dtype
from engine.model import Model

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


def choose_dtype(name: str, device: torch.device) -> Dtype:
    """``auto``: bfloat16 on CUDA and on CPUs that multiply it (AMX, AVX512-BF16), else float32.

    A CPU without either emulates it: a prefill's take 8 times as long on AVX2 (docs/adr/0004-engine-numerics.md).
    """
    match name:
        case "float32" | "bfloat16":
            return name
        case "auto":
            return "bfloat16" if device.type == "cuda" or _cpu_multiplies_bf16() else "float32"
        case _:
            raise ConfigError(f"is {name!r}, allowed: auto, {', '.join(DTYPES)}", field="model.dtype")


def _cpu_multiplies_bf16() -> bool:
    if platform.system() != "Linux":
        return False
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    return "amx_bf16" in flags or "avx512_bf16" in flags


def storage_dtype(folder: Path, compute: torch.dtype) -> torch.dtype:
    """What matrices are held in until they are packed: bfloat16 loses nothing of a bfloat16 checkpoint."""
    _, first = next(_tensors(folder))
    return torch.bfloat16 if first.dtype == torch.bfloat16 else compute


def load(model: Model, folder: Path) -> None:
    """Fills ``model`` from the safetensors files in ``folder``. Raises :class:`ConfigError` for a file that is broken,
    a tensor that is missing, unknown or of the wrong shape."""
    targets = _targets(model)
    for name, tensor in _tensors(folder):
        if name.endswith(IGNORED_SUFFIXES) or (name == "lm_head.weight" and model.spec.tied_head):
            continue
        target = targets.pop(name, None)
        if target is None:
            raise ConfigError(f"{folder} has a tensor {name} that this model has no place for", field="model.id")
        if target.shape != tensor.shape:
            raise ConfigError(
                f"{name} is {tuple(tensor.shape)}, the config says {tuple(target.shape)}", field="model.id"
            )
        target.copy_(tensor)
    if targets:
        raise ConfigError(f"{folder} lacks {len(targets)} tensors, such as {min(targets)}", field="model.id")


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} has no .safetensors file", field="model.id")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise ConfigError(f"{file} is not a readable safetensors file: {error}", field="model.id") from None


def _targets(model: Model) -> dict[str, torch.Tensor]:
    """Where each checkpoint tensor goes: views into the stacked parameters."""
    spec = model.spec
    width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    targets = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    if not spec.tied_head:
        targets["lm_head.weight"] = model.head.weight
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        q, k, v = torch.split(layer.qkv.weight, [width, kv_width, kv_width])
        gate, up = layer.mlp.gate_up.weight.chunk(2)
        named = {
            "input_layernorm": layer.attention_norm,
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "self_attn.o_proj": layer.out.weight,
            "post_attention_layernorm": layer.mlp_norm,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": layer.mlp.down.weight,
        }
        targets |= {f"{prefix}{name}.weight": tensor for name, tensor in named.items()}
    return targets
