"""A checkpoint's safetensors into one rank's parameters: each tensor straight from its file into its place, and of each
only the part that the rank holds. A load never needs a second copy of the model."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baton.errors import ConfigError
from baton.layout import DTYPES, Dtype
from engine.model import Layer, Mlp, Model, Projection

log = logging.getLogger(__name__)

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
STORED = ("BF16", "F16", "F32")
LOG_S = 5.0

Progress = Callable[[int, int], None]  # bytes of this rank's weights that are in place, and of all of them


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor of the checkpoint goes."""

    shape: tuple[int, ...]  # of the whole tensor
    target: Tensor | None  # a view into a parameter, which this rank's part fills; None where only rank 0 has it
    axis: int | None = None  # the ranks share the tensor along it, each a contiguous part; None: whole

    @property
    def bytes(self) -> int:
        return 0 if self.target is None else self.target.nbytes

    def fill(self, stored: Any, rank: int) -> None:
        """``stored``: the tensor's slice in an open file; no more than this rank's part of it is read."""
        if self.target is None:
            return
        if self.axis is None:
            self.target.copy_(stored[:])
            return
        size = self.target.shape[self.axis]
        part = slice(rank * size, (rank + 1) * size)
        self.target.copy_(stored[part] if self.axis == 0 else stored[:, part])


class LoadLog:
    """Progress of a load that takes long, as a line in the log every few seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due_s = clock() + LOG_S

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now_s = self._clock()
        if now_s >= self._due_s:
            self._due_s = now_s + LOG_S
            log.info("weights: %.0f %% of %.1f GB loaded", 100 * done_bytes / total_bytes, total_bytes / 1e9)


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
    """What matrices are held in until they are packed: bfloat16 where it holds all that the checkpoint says of them."""
    for file in checkpoint_files(folder):
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                stored = opened.get_slice(name)
                if len(stored.get_shape()) == 2 and stored.get_dtype() != "BF16":
                    return compute
    return torch.bfloat16


def load(model: Model, folder: Path, progress: Progress | None = None) -> None:
    """Fills ``model`` with its rank's part of the checkpoint in ``folder``, file by file.

    At any time one file is mapped, from which tensors are copied without one in between. Raises :class:`ConfigError`
    for a file that is broken or absent, and for a tensor that is missing, unknown, misshaped or quantized.
    """
    expected, done_bytes = places(model), 0
    total_bytes = sum(place.bytes for place in expected.values())
    for file in checkpoint_files(folder):
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                if name.endswith(IGNORED_SUFFIXES) or (name == "lm_head.weight" and model.spec.tied_head):
                    continue
                place = expected.pop(name, None)
                if place is None:
                    raise _unfit(f"{file} has a tensor {name} that this model has no place for, or has it twice")
                stored = opened.get_slice(name)
                _check(name, stored, place)
                place.fill(stored, model.comm.rank)
                done_bytes += place.bytes
                if progress is not None:
                    progress(done_bytes, total_bytes)
    if expected:
        raise _unfit(f"{folder} lacks {len(expected)} tensors, such as {min(expected)}")


def checkpoint_files(folder: Path) -> list[Path]:
    """The files that the checkpoint consists of: those its index names, or ``model.safetensors``, or all there are.

    A folder may hold the same weights a second time in another form, such as Mistral's ``consolidated.safetensors``.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return [_indexed(folder, name) for name in sorted(_index(index))]
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise _unfit(f"{folder} has no .safetensors file")
    return files


def _index(path: Path) -> set[str]:
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if named and all(isinstance(name, str) for name in named.values()):
            return set(named.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unfit(f"cannot read {path}: {error!r}") from None
    raise _unfit(f"{path} names no files")


def _indexed(folder: Path, name: str) -> Path:
    file = folder / name
    if file.parent != folder or not file.is_file():
        raise _unfit(f"{folder}/model.safetensors.index.json names {name}, which is not in the folder")
    return file


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise _unfit(f"{file} is not a readable safetensors file: {error}") from None


def _check(name: str, stored: Any, place: Place) -> None:
    shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
    if shape != place.shape:
        raise _unfit(f"{name} is {shape}, the config says {place.shape}")
    if dtype not in STORED:
        raise _unfit(f"{name} is stored as {dtype}, supported: {', '.join(STORED)}")


def _unfit(reason: str) -> ConfigError:
    return ConfigError(reason, field="model.id")


def places(model: Model) -> dict[str, Place]:
    """Where each tensor of the checkpoint goes, by its name there: what weights ``model`` has, and how it shares them.

    Matrices whose outputs are split (q, k, v, gate, up, and the vocabulary) are shared by rows, those that add up
    (attention's output, down) by columns: Megatron-LM, arXiv:1909.08053.
    """
    ranks = model.comm.ranks
    found = {
        "model.embed_tokens.weight": _by_rows(model.embedding, ranks),
        "model.norm.weight": _whole(model.norm),
    }
    if not model.spec.tied_head:
        found["lm_head.weight"] = _by_rows(model.head.weight, ranks)
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        parts = {**_attention(model, layer), **_mlp(model, layer.mlp)}
        found |= {prefix + name: place for name, place in parts.items()}
    return found


def _attention(model: Model, layer: Layer) -> dict[str, Place]:
    spec, ranks = model.spec, model.comm.ranks
    q, kv = model.heads * spec.head_dim, model.kv_heads * spec.head_dim
    names = [f"self_attn.{name}_proj" for name in "qkv"]
    found = _stacked(names, layer.qkv, [q, kv, kv], ranks)
    found |= _summed("self_attn.o_proj", layer.out, ranks, biased=spec.out_bias)
    found |= {
        "input_layernorm.weight": _whole(layer.attention_norm),
        "post_attention_layernorm.weight": _whole(layer.mlp_norm),
    }
    if layer.head_norms is not None:
        for name, target in zip(("q", "k"), layer.head_norms, strict=True):
            found[f"self_attn.{name}_norm.weight"] = _whole(target)
    return found


def _mlp(model: Model, mlp: Mlp) -> dict[str, Place]:
    ranks, width = model.comm.ranks, model.intermediate
    stacked = _stacked(["mlp.gate_proj", "mlp.up_proj"], mlp.gate_up, [width, width], ranks)
    return stacked | _summed("mlp.down_proj", mlp.down, ranks, biased=model.spec.mlp_bias)


def _stacked(names: Sequence[str], projection: Projection, rows: list[int], ranks: int) -> dict[str, Place]:
    """Matrices that lie one below the other in ``projection``, ``rows`` of each on this rank."""
    found: dict[str, Place] = {}
    for kind, stack in (("weight", projection.weight), ("bias", projection.bias)):
        if stack is not None:
            parts = zip(names, torch.split(stack, rows), strict=True)
            found |= {f"{name}.{kind}": _by_rows(part, ranks) for name, part in parts}
    return found


def _summed(name: str, projection: Projection, ranks: int, *, biased: bool) -> dict[str, Place]:
    """A matrix shared by columns; the checkpoint's bias goes to the one rank that adds it."""
    outputs, columns = projection.weight.shape
    found = {f"{name}.weight": Place((outputs, columns * ranks), projection.weight, axis=1)}
    if biased:
        found[f"{name}.bias"] = Place((outputs,), projection.bias)
    return found


def _by_rows(target: Tensor, ranks: int) -> Place:
    return Place((target.shape[0] * ranks, *target.shape[1:]), target, axis=0)


def _whole(target: Tensor) -> Place:
    return Place(tuple(target.shape), target)
