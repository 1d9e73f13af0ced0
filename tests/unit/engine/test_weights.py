"""Loading weights: shards, broken files, missing and unknown tensors, the choice of dtype."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.config import PoolConfig
from baton.errors import ConfigError
from engine import weights
from engine.build import build_engine, load_model
from engine.model import Model

if TYPE_CHECKING:
    from tests.unit.engine.conftest import Harness


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_sharded_files_give_the_same_tokens(folder: Path, tiny: Model, harness: Harness) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:9]}, folder / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[9:]}, folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    work = harness.work("a", harness.prompt(9))
    assert harness.alone(load_model(folder, "float32", 1), work) == harness.alone(tiny, work)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks 1 tensors, such as model\.norm\.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "no place for"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"is \(3,\), the config says \(48,\)"),
    ],
)
def test_tensors_that_do_not_fit_the_config(folder: Path, change: object, message: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        load_model(folder, "float32", 1)


def test_a_cut_file_and_no_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="not a readable safetensors"):
        load_model(folder, "float32", 1)
    file.unlink()
    with pytest.raises(ConfigError, match=r"no \.safetensors"):
        load_model(folder, "float32", 1)


def test_dtype_is_chosen_by_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights.choose_dtype("auto", torch.device("cuda")) == "bfloat16"
    assert weights.choose_dtype("bfloat16", torch.device("cpu")) == "bfloat16"
    for flags, dtype in (("avx2 amx_bf16 x", "bfloat16"), ("avx512_bf16", "bfloat16"), ("avx2 avx512f", "float32")):
        monkeypatch.setattr(Path, "read_text", lambda self, flags=flags, **kwargs: flags)
        assert weights.choose_dtype("auto", torch.device("cpu")) == dtype
    with pytest.raises(ConfigError, match="allowed: auto, float32, bfloat16"):
        weights.choose_dtype("float16", torch.device("cpu"))


def test_build_engine_takes_the_pools_limits(tiny: Model, harness: Harness) -> None:
    engine = build_engine(tiny, PoolConfig(page_tokens=8, kv_tokens=200), 128)
    assert engine.load().pages_total == 25
    assert engine.layout == tiny.layout
    with pytest.raises(ConfigError) as refused:
        build_engine(tiny, PoolConfig(kv_tokens=100), 128)
    assert refused.value.field == "kv_tokens"


def test_the_layout_names_the_weights(folder: Path, tiny: Model) -> None:
    assert load_model(folder, "float32", 1).layout == tiny.layout
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "0"}))
    assert load_model(folder, "float32", 1).layout.fingerprint == tiny.layout.fingerprint
    tensors = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    assert load_model(folder, "float32", 1).layout.fingerprint != tiny.layout.fingerprint
