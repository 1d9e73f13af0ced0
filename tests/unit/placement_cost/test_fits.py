from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import ConfigError
from placement.cost import StepShape, step_s
from placement.fits import OptFit
from placement.handoff_cost import HandoffCost

FIT = OptFit("opt", 1, 1, (20.0, 0.1, 1e-5), (10.0, 0.001, 0.05), (8.0, 0.0005, 0.1), 95, 60_000)
PAIRS = st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 2000)), min_size=1, max_size=8)


def test_prefill_by_hand() -> None:
    step = StepShape(((0, 100), (0, 300)), ())
    assert step_s(FIT, step) == pytest.approx((20 + 0.1 * 400 + 1e-5 * (100**2 + 300**2)) / 1e3)


@pytest.mark.parametrize(("batch", "milliseconds"), [(94, 10 + 94 + 0.05 * 94), (95, 8 + 0.0005 * 95_000 + 0.1 * 95)])
def test_decode_by_hand_on_both_sides_of_the_threshold(batch: int, milliseconds: float) -> None:
    assert step_s(FIT, StepShape((), (1000,) * batch)) == pytest.approx(milliseconds / 1e3)


def test_mixed_step_pays_the_weights_once() -> None:
    mixed = step_s(FIT, StepShape(((0, 100),), (500, 700)))
    apart = step_s(FIT, StepShape(((0, 100),), ())) + step_s(FIT, StepShape((), (500, 700)))
    assert mixed == pytest.approx(apart - 0.010)


@settings(deadline=None)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=6))
def test_chunks_sum_to_their_prompt_and_one_constant_each(counts: list[int]) -> None:
    starts = [sum(counts[:i]) for i in range(len(counts))]
    chunks = sum(step_s(FIT, StepShape(((a, n),), ())) for a, n in zip(starts, counts, strict=True))
    assert chunks == pytest.approx(step_s(FIT, StepShape(((0, sum(counts)),), ())) + 0.020 * (len(counts) - 1))


@settings(deadline=None)
@given(PAIRS)
def test_decode_sum_form_is_the_step(pairs: list[tuple[int, int]]) -> None:
    contexts = tuple(a + b for a, b in pairs)
    assert FIT.decode_step_s(len(contexts), sum(contexts)) == step_s(FIT, StepShape((), contexts))


def test_empty_step_costs_nothing() -> None:
    assert step_s(FIT, StepShape((), ())) == 0.0
    assert FIT.transfer_s(100) == FIT.exposed_transfer_s(100) == 0.0


def test_handoff_is_a_term_of_its_own() -> None:
    fit = OptFit("opt", 1, 2, FIT.prefill_ms, FIT.small_batch_ms, FIT.large_batch_ms, 95, 1, HandoffCost(1000, 10, 1e6))
    assert fit.gpus == 2
    assert fit.transfer_s(100) == pytest.approx(0.1)
    # Prefill of 100 tokens takes 30.1 ms, so the wire falls behind by 69.9 ms in nine of ten layers.
    assert fit.exposed_transfer_s(100) == pytest.approx(0.01 + (0.1 - 0.0301) * 0.9)


def test_published_opt_13b(data: Path) -> None:
    fit = OptFit.load(data / "distserve" / "profiler-a100-80g.distserve.json", tp=2, pp=4)
    assert step_s(fit, StepShape(((0, 1000),), ())) == pytest.approx(
        (14.742973695171262 + 0.06857720739764 * 1000 + 2.4495727400243586e-06 * 1e6) / 1e3
    )
    assert step_s(fit, StepShape((), (500,) * 10)) == pytest.approx(
        (13.294796350285385 + 0.00034109219700723494 * 5000 + 0.06296393225243659 * 10) / 1e3
    )
    assert fit.kv_tokens() == 744224
    assert fit.gpus == 8


@pytest.mark.parametrize(
    ("change", "key"),
    [({"model": "facebook/opt-1b"}, "fits.model"), ({"tp": 7}, "fits.tp"), ({"pp": 7}, "fits.pp")],
)
def test_what_was_not_fitted_is_named(data: Path, change: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        OptFit.load(data / "distserve" / "profiler-a100-80g.vllm.json", **change)  # type: ignore[arg-type]
    assert error.value.field == key


def test_damaged_coefficients_are_named(tmp_path: Path) -> None:
    file = tmp_path / "fit.json"
    file.write_text(json.dumps({"m": {"1": {"prefill": [1, 2]}}}))
    with pytest.raises(ConfigError, match="three coefficients"):
        OptFit.load(file, model="m")


@pytest.mark.parametrize(("name", "text"), [("none.json", None), ("list.json", "[]"), ("bad.json", "{")])
def test_what_holds_no_fits_is_refused(tmp_path: Path, name: str, text: str | None) -> None:
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as error:
        OptFit.load(file)
    assert error.value.field == "fits"


def test_a_missing_capacity_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "fit.json"
    regime = [1.0, 2.0, 3.0]
    entry = {"prefill": regime, "decoding_smallbs": regime, "decoding_largebs": regime}
    file.write_text(json.dumps({"m": {"1": entry | {"decoding_large_small_bs_threshold": 5}}}))
    with pytest.raises(ConfigError, match="max_num_tokens"):
        OptFit.load(file, model="m")
