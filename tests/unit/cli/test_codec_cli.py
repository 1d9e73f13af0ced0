from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from baton.errors import InvalidRequest
from deploy.cli import app
from deploy.codec_cli import bytes_per_s, seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's config, which is all that a layout needs."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 4,
        "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def explained(folder: Path, *options: str) -> str:
    result = CliRunner().invoke(
        app, ["codec", "explain", "--model", str(folder), *options], env={"COLUMNS": "240"}, catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1Gbit", 125e6), ("1gbit/s", 125e6), ("10Gb/s", 1.25e9), ("10 Gbps", 1.25e9), ("2.5GB", 2.5e9),
        ("2.5 GB/s", 2.5e9), ("800Mbit", 1e8), ("1e9B", 1e9),
    ],
)  # fmt: skip
def test_bandwidths(text: str, expected: float) -> None:
    assert bytes_per_s("bandwidth", text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "fast", "1", "0Gbit", "-1Gbit", "1.2.3GB", "1e999GB", "GB"])
def test_what_is_no_bandwidth_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(repr(text))) as refused:
        bytes_per_s("bandwidth", text)
    assert refused.value.field == "bandwidth"


@pytest.mark.parametrize(
    ("text", "expected"), [("50us", 5e-5), ("2ms", 2e-3), ("0.5s", 0.5), ("3 µs", 3e-6), ("0s", 0.0)]
)
def test_durations(text: str, expected: float) -> None:
    assert seconds("latency", text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "5", "-1s", "soon", "1..5s"])
def test_what_is_no_duration_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        seconds("latency", text)
    assert refused.value.field == "latency"


def test_every_codec_is_listed_and_the_choice_is_within_the_floor(folder: Path) -> None:
    text = explained(folder, "--bandwidth", "100Mbit", "--latency", "1ms", "--floor", "int8", "--tokens", "1000")
    assert "1,000 tokens" in text
    assert "link 100 Mbit/s, 1.0 ms a fetch; quality floor int8" in text
    for codec in ("raw", "lossless", "int8-zstd", "int4", "int2-zstd"):
        assert re.search(rf"^[> ] {codec} ", text, re.MULTILINE)
    assert re.search(r"^> int8-zstd ", text, re.MULTILINE)
    assert "chosen: int8-zstd exposes" in text
    assert "by bandwidth, with floor int8: int8-zstd up to " in text


def test_raw_on_a_link_that_nothing_can_feed(folder: Path) -> None:
    text = explained(folder, "--bandwidth", "10000Gbit", "--floor", "exact")
    assert "chosen: raw exposes" in text
    assert re.search(r"floor exact: lossless up to .*, then raw", text)


def test_what_prefill_hides_and_the_deadline_are_taken_into_account(folder: Path) -> None:
    text = explained(folder, "--bandwidth", "1Gbit", "--prefill", "10s", "--deadline", "1s")
    assert "prefill goes on for 10,000 ms" in text
    assert "the deadline in 1e+03 ms is out of reach" in text


def test_without_a_bandwidth_this_machine_is_measured(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "baton.yaml"
    config.write_text("handoff: {transport: tcp}\n")
    text = explained(folder, "--config", str(config), "--handoffs", "3")
    rate = re.search(r"link ([0-9.]+) Gbit/s", text)
    assert rate is not None
    assert float(rate[1]) > 0.5
