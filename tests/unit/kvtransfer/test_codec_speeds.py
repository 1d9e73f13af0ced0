from __future__ import annotations

import time

import pytest

from baton.config_handoff import CODECS, LOSS, codecs_within
from baton.layout import KVLayout
from kvtransfer.codec_speeds import describe, measure_codecs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_codec_is_measured_in_little_time(dtype):
    layout = KVLayout("m", 30, 3, 64, dtype)
    measure_codecs(layout, ["raw"])  # compiles
    started = time.monotonic()
    found = measure_codecs(layout, CODECS, budget_s=5.0)
    assert time.monotonic() - started < 4.0
    assert [one.name for one in found] == list(CODECS)
    for one in found:
        assert one.loss == LOSS[one.name]
        for speed in (one.encode, one.decode):
            assert speed.block_s >= 0.0
            assert 1e6 < speed.bytes_per_s <= 1e13
    ratios = {one.name: one.ratio for one in found}
    assert ratios["raw"] == pytest.approx(1.0, abs=0.01)
    assert ratios["lossless"] > (1.1 if dtype == "float32" else 1.3)
    assert ratios["int8"] > (3.5 if dtype == "float32" else 1.8)
    assert ratios["int4-zstd"] > ratios["int4"] > ratios["int8-zstd"] > ratios["int8"]


def test_without_time_only_the_first_is_measured(caplog):
    found = measure_codecs(KVLayout("m", 2, 2, 32, "bfloat16"), codecs_within("int8"), budget_s=0.0)
    assert [one.name for one in found] == ["raw"]
    assert "no time to measure codecs lossless, int8, int8-zstd" in caplog.text


def test_a_token_as_large_as_a_block_is_measured_too():
    (raw,) = measure_codecs(KVLayout("m", 1, 128, 1024, "float32"), ["raw"])
    assert raw.encode.block_s == 0.0


def test_a_description_names_them_all():
    found = measure_codecs(KVLayout("m", 2, 2, 32, "bfloat16"), ("raw", "lossless"))
    assert describe(found).startswith("raw 1.00x ")
    assert ", lossless 1." in describe(found)
