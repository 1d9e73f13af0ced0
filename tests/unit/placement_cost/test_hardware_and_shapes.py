from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton.errors import ConfigError
from placement.hardware import BUILT_IN as HARDWARE
from placement.hardware import Hardware
from placement.model_shape import ModelShape


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3.1-8b", 8.03), ("llama-3.1-70b", 70.55), ("opt-13b", 12.84), ("smollm2-135m-instruct", 0.1345)],
)
def test_parameters_are_the_published_ones(name: str, billions: float) -> None:
    assert ModelShape.load(name).parameters / 1e9 == pytest.approx(billions, rel=0.002)


def test_kv_bytes_split_over_ranks_until_heads_run_out() -> None:
    shape = ModelShape.load("llama-3.1-70b")
    assert shape.kv_token_bytes == 2 * 80 * 8 * 128 * 2
    assert [shape.rank_kv_token_bytes(tp) * tp // shape.kv_token_bytes for tp in (1, 4, 8, 16)] == [1, 1, 1, 2]
    assert shape.allows(8, 10)
    assert not shape.allows(3, 1)
    assert not shape.allows(1, 81)


def test_hugging_face_configs(tmp_path: Path) -> None:
    llama = {"num_attention_heads": 9, "hidden_size": 576, "num_hidden_layers": 30, "num_key_value_heads": 3,
             "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(llama))
    shape = ModelShape.load(tmp_path, dtype="float32")
    assert (shape.head_dim, shape.gated, shape.dtype_bytes) == (64, True, 4)
    opt = ModelShape.from_config(
        {"model_type": "opt", "num_attention_heads": 40, "hidden_size": 5120, "num_hidden_layers": 40,
         "ffn_dim": 20480, "vocab_size": 50272, "torch_dtype": "float16"}, "opt-13b",
    )  # fmt: skip
    assert opt == ModelShape.load("opt-13b")


@pytest.mark.parametrize(
    ("config", "key"),
    [({}, "num_attention_heads"), ({"num_attention_heads": 4, "hidden_size": 0}, "hidden_size")],
)
def test_missing_sizes_are_named(tmp_path: Path, config: dict[str, int], key: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=key):
        ModelShape.load(file)


@pytest.mark.parametrize("name", HARDWARE)
def test_shipped_hardware_loads(name: str) -> None:
    hardware = Hardware.load(name)
    assert hardware.peak_flops("bfloat16") > 1e14
    assert hardware.stream_bytes_per_s < hardware.memory_bytes_per_s
    assert hardware.link_bytes_per_s(8) > hardware.link_bytes_per_s(9)


def test_shipped_h200_is_the_measured_one(data: Path) -> None:
    shipped, given = Hardware.load("h200-sxm"), Hardware.load(data / "h200" / "h200_sxm.yaml")
    assert shipped == given


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("gpu: {}\nnode: {}\n", "hardware.gpu"),
        ("gpu: {bfloat16_tc_flops: 1, mem_capacity: -1}\nnode: {}\n", "hardware.gpu.mem_capacity"),
        ("[]", "hardware.gpu"),
        ("gpu: {bfloat16_tc_flops: fast}\nnode: {}\n", "hardware.gpu.bfloat16_tc_flops"),
    ],
)
def test_bad_hardware_names_the_key(tmp_path: Path, text: str, key: str) -> None:
    file = tmp_path / "gpu.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        Hardware.load(file)
    assert error.value.field == key


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(ConfigError, match="h200-sxm"):
        Hardware.load("h900")
    with pytest.raises(ConfigError, match=r"llama-3\.1-70b"):
        ModelShape.load("llama-9")
    with pytest.raises(ConfigError, match="has no fp4"):
        Hardware.load("a100-80g-sxm").peak_flops("fp4")


@pytest.mark.parametrize(
    ("change", "key"), [({"kv_heads": 3}, "kv_heads"), ({"layers": 0}, "layers"), ({"dtype": "int3"}, "dtype")]
)
def test_impossible_shapes_are_named(change: dict[str, int | str], key: str) -> None:
    sizes = {"name": "x", "layers": 1, "hidden": 8, "heads": 4, "kv_heads": 2, "head_dim": 2, "intermediate": 8}
    with pytest.raises(ConfigError) as error:
        ModelShape(**({"vocab": 10} | sizes | change))  # type: ignore[arg-type]
    assert error.value.field == f"model.{key}"


def test_files_that_are_no_mappings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="not a JSON object"):
        ModelShape.load(tmp_path)
    (tmp_path / "gpu.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not YAML"):
        Hardware.load(tmp_path / "gpu.yaml")
