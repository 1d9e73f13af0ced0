"""What the handoff benches conclude from their figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.layout import KVLayout
from bench.ends import Push
from bench.prompt import Prompt
from bench.shaped import Way, break_even, judge, pushes, ways


def test_the_chooser_is_held_against_what_its_floor_allows() -> None:
    times = {"raw": 300.0, "lossless": 200.0, "int4": 80.0, "auto (exact)": 210.0, "auto (int4)": 100.0}
    rows = {name: {"exposed_ms": ms} for name, ms in times.items()}
    verdicts = judge(rows)
    assert verdicts["exact"]["best_fixed"] == "lossless"
    assert verdicts["exact"]["over_best"] == pytest.approx(1.05)
    assert verdicts["int4"]["best_fixed"] == "int4"
    assert verdicts["int4"]["over_best"] == pytest.approx(1.25)
    assert verdicts["int4"]["raw_over_chooser"] == pytest.approx(3.0)


def test_break_even_lies_where_the_lines_cross() -> None:
    assert break_even([(1, 300, 100), (10, 30, 50)]) == pytest.approx(10 ** (200 / 220))
    assert break_even([(1, 300, 100), (10, 90, 50)]) is None
    assert break_even([(1, 100, 300), (10, 30, 50)]) is None


def test_every_fixed_codec_runs_under_the_floor_that_it_needs() -> None:
    assert ways(["raw", "int4-zstd"], ["exact"]) == [
        Way("raw", "exact"),
        Way("int4-zstd", "int4"),
        Way("auto", "exact"),
    ]


def test_a_faster_engine_pushes_sooner() -> None:
    prompt = Prompt(KVLayout("m", 1, 1, 8, "float32"), 8, Path("p"), (Push(0.5, 0, 0, 8),), 0.5)
    assert pushes(prompt, 10.0) == (Push(0.05, 0, 0, 8),)
    assert pushes(prompt, float("inf")) == prompt.at_once()
