"""Loading weights: shards, broken files, missing and unknown tensors, the choice of dtype."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
from collections.abc import Callable
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
from engine.spec import ModelSpec

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
        (lambda t: t.update({"model.norm.weight": torch.zeros(48).to(torch.float8_e4m3fn)}), "stored as F8_E4M3"),
    ],
)
def test_tensors_that_do_not_fit_the_config(folder: Path, change: object, message: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        load_model(folder, "float32", 1)


def shard(folder: Path, names: dict[str, list[str]]) -> None:
    """Writes the one file's tensors to files of the given tensors, and an index of them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for file, members in names.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    places = {name: file for file, members in names.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def halves(folder: Path) -> dict[str, list[str]]:
    names = sorted(load_file(folder / "model.safetensors"))
    return {"a.safetensors": names[::2], "b.safetensors": names[1::2]}


def test_an_index_names_the_files(folder: Path, tiny: Model, harness: Harness) -> None:
    whole = load_file(folder / "model.safetensors")
    shard(folder, halves(folder))
    save_file({"in.another.form": whole["model.norm.weight"]}, folder / "consolidated.safetensors")
    assert weights.checkpoint_files(folder) == [folder / "a.safetensors", folder / "b.safetensors"]
    work = harness.work("a", harness.prompt(9))
    assert harness.alone(load_model(folder, "float32", 1), work) == harness.alone(tiny, work)


def test_one_file_without_an_index_is_the_whole_checkpoint(folder: Path) -> None:
    save_file({"other": torch.zeros(1)}, folder / "consolidated.safetensors")
    assert weights.checkpoint_files(folder) == [folder / "model.safetensors"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"model.norm.weight": "absent.safetensors"}}, r"names absent\.safetensors, which is not"),
        ({"weight_map": {"model.norm.weight": "../model/model.safetensors"}}, "which is not in the folder"),
        ({"weight_map": {}}, "names no files"),
        ({"weight_map": {"model.norm.weight": 3}}, "names no files"),
        ({"weight_map": 3}, "cannot read"),
        ({}, "cannot read .*weight_map"),
        ([], "cannot read"),
    ],
)
def test_an_index_that_is_wrong(folder: Path, index: object, message: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=message) as refused:
        load_model(folder, "float32", 1)
    assert refused.value.field == "model.id"


def test_an_index_that_is_cut_and_a_tensor_that_is_there_twice(folder: Path) -> None:
    parts = halves(folder)
    parts["b.safetensors"].append(parts["a.safetensors"][0])
    shard(folder, parts)
    with pytest.raises(ConfigError, match="or has it twice"):
        load_model(folder, "float32", 1)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text()[:-9])
    with pytest.raises(ConfigError, match="cannot read"):
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


def test_matrices_wait_in_bfloat16_when_all_of_them_are_bfloat16(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert weights.storage_dtype(folder, torch.float32) == torch.float32
    stored = {name: t.bfloat16() if t.dim() == 2 else t for name, t in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    assert weights.storage_dtype(folder, torch.float32) == torch.bfloat16
    save_file(stored | {"lm_head.weight": tensors["lm_head.weight"]}, folder / "model.safetensors")
    assert weights.storage_dtype(folder, torch.float32) == torch.float32


class Share:
    """A rank that only loads."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def all_reduce(self, part: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no step runs")

    gather = all_reduce


def share(spec: ModelSpec, rank: int, ranks: int, storage: torch.dtype = torch.float32) -> Model:
    device = torch.device("cpu")
    return Model(spec, name="share", dtype="float32", device=device, storage=storage, comm=Share(rank, ranks))


def test_ranks_get_their_slices_and_rank_0_the_added_biases(tmp_path: Path, harness: Harness) -> None:
    folder = harness.save_llama(tmp_path, attention_bias=True, mlp_bias=True)
    stored, spec = load_file(folder / "model.safetensors"), ModelSpec.from_folder(tmp_path)
    for rank in range(2):
        model, told = share(spec, rank, 2), list[tuple[int, int]]()
        weights.load(model, folder, lambda done, total, told=told: told.append((done, total)))  # type: ignore[misc]
        layer, prefix = model.layers[1], "model.layers.1."
        q, k, v = (stored[f"{prefix}self_attn.{name}_proj.weight"].chunk(2)[rank] for name in "qkv")
        assert torch.equal(layer.qkv.weight, torch.cat((q, k, v)))
        gate, up = (stored[f"{prefix}mlp.{name}_proj.bias"].chunk(2)[rank] for name in ("gate", "up"))
        assert layer.mlp.gate_up.bias is not None
        assert torch.equal(layer.mlp.gate_up.bias, torch.cat((gate, up)))
        assert torch.equal(layer.mlp.down.weight, stored[f"{prefix}mlp.down_proj.weight"].chunk(2, dim=1)[rank])
        assert torch.equal(model.embedding, stored["model.embed_tokens.weight"].chunk(2)[rank])
        assert torch.equal(model.head.weight, stored["lm_head.weight"].chunk(2)[rank])
        assert torch.equal(layer.attention_norm, stored[f"{prefix}input_layernorm.weight"])
        assert (layer.out.bias is not None) == (layer.mlp.down.bias is not None) == (rank == 0)
        done = [bytes_done for bytes_done, _ in told]
        assert done == sorted(done)
        assert len(done) == len(stored)
        assert {total for _, total in told} == {done[-1]}
        assert done[-1] == sum(t.nbytes for t in parameters(model))


def parameters(model: Model) -> list[torch.Tensor]:
    """Every tensor that holds weights, found without the loader's help."""
    found = [model.embedding, model.norm, *([] if model.spec.tied_head else [model.head.weight])]
    for layer in model.layers:
        found += [layer.attention_norm, layer.mlp_norm]
        for part in (layer.qkv, layer.out, layer.mlp.gate_up, layer.mlp.down):
            found += [part.weight, *([part.bias] if part.bias is not None else [])]
    return found


LARGE = ModelSpec(
    vocab_size=4096, hidden=512, intermediate=1536, layers=8, heads=8, kv_heads=8, head_dim=64, norm_eps=1e-6,
    rope_theta=1e4, rope_scaling=None, tied_head=True, max_context=64, bos_token_id=None, eos_token_ids=(),
)  # fmt: skip
SLACK_BYTES = 4 << 20  # what Python and the allocator take on the way; a second copy would be 58 MB


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 58 MB in bfloat16: one file of 4 MB and one of 6.8 MB for each layer."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, place in weights.places(share(LARGE, 0, 1, torch.bfloat16)).items():
        file = name.split(".")[2] if name.startswith("model.layers.") else "top"
        files.setdefault(f"{file}.safetensors", {})[name] = torch.randn(place.shape, dtype=torch.bfloat16)
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    return folder


def memory(key: str) -> int:
    """Bytes of this process's ``VmRSS`` or its peak, ``VmHWM``."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def peak_of(work: Callable[[], object]) -> int:
    """Bytes by which resident memory, mapped files included, rises at most during ``work``."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or memory freed earlier would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    kept = work()
    after = memory("VmHWM")
    del kept
    return after - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory")
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_load_takes_at_most_one_file_above_the_model(large: Path, ranks: int) -> None:
    def load() -> Model:
        model = share(LARGE, ranks - 1, ranks, torch.bfloat16)
        weights.load(model, large)
        return model

    def load_from_a_copy() -> object:
        """What the test is there to catch: the loader's work with the whole checkpoint in memory beside it."""
        copies = [load_file(file) for file in weights.checkpoint_files(large)]
        return [tensor.clone() for file in copies for tensor in file.values()], load()

    peak_of(load)  # once unmeasured: code and libraries are read in
    allowed = sum(t.nbytes for t in parameters(load())) + max(file.stat().st_size for file in large.iterdir())
    assert peak_of(load) < allowed + SLACK_BYTES
    assert peak_of(load_from_a_copy) > allowed + 4 * SLACK_BYTES


def test_a_long_load_says_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    told = weights.LoadLog(lambda: now_s)
    with caplog.at_level("INFO"):
        for second in range(12):
            now_s = float(second)
            told(second * 10**9, 20 * 10**9)
    assert [record.getMessage() for record in caplog.records] == [
        "weights: 25 % of 20.0 GB loaded",
        "weights: 50 % of 20.0 GB loaded",
    ]
