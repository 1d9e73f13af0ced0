"""The stage ledger always sums to what the client saw."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.ledger import STAGES, Ledger, blend, close

SECONDS = st.floats(min_value=0.0, max_value=1e5)


@given(st.floats(min_value=1e-6, max_value=1e5), st.dictionaries(st.sampled_from(STAGES), st.floats(-10.0, 1e5)))
def test_closed_stages_sum_to_the_total(total_s: float, measured: dict[str, float]) -> None:
    stages = close(total_s, measured)
    assert tuple(stages) == STAGES
    assert sum(stages.values()) == pytest.approx(total_s)
    assert min(stages.values()) >= 0.0


@given(SECONDS, SECONDS)
def test_what_no_stage_explains_is_deliver(prefill_s: float, rest_s: float) -> None:
    stages = close(prefill_s + rest_s, {"prefill": prefill_s})
    assert stages["prefill"] == pytest.approx(prefill_s)
    assert stages["deliver"] == pytest.approx(rest_s, abs=1e-9 * (prefill_s + rest_s))


def test_stages_that_exceed_the_total_are_scaled_evenly() -> None:
    stages = close(1.0, {"prefill": 1.5, "decode": 0.5, "deliver": 9.0})
    assert stages["prefill"] == pytest.approx(0.75)
    assert stages["decode"] == pytest.approx(0.25)
    assert stages["deliver"] == 0.0


def test_hidden_share() -> None:
    stages = close(1.0, {"encode": 0.01, "wire": 0.02, "land": 0.01, "prefill": 0.5})
    ledger = Ledger(1.0, stages, transfer_busy_s=0.16, transfer_bytes=1000, codec="raw", transport="tcp")
    assert ledger.transfer_exposed_s == pytest.approx(0.04)
    assert ledger.transfer_hidden_share == pytest.approx(0.75)


@given(SECONDS, SECONDS)
def test_the_hidden_share_is_a_share(busy_s: float, wire_s: float) -> None:
    assert 0.0 <= Ledger(1e6, {"wire": wire_s}, transfer_busy_s=busy_s).transfer_hidden_share <= 1.0


@pytest.mark.parametrize(
    ("codec_tokens", "shown"),
    [
        ({}, ""),
        ({"raw": 30}, "raw"),
        ({"raw": 30, "lossless": 70}, "lossless 70 %, raw 30 %"),
        ({"raw": 1, "int8": 1, "lossless": 2}, "lossless 50 %, int8 25 %, raw 25 %"),
        ({"raw": 0, "int8": 0}, "int8 0 %, raw 0 %"),
    ],
)
def test_a_blend_names_codecs_by_their_share(codec_tokens: dict[str, int], shown: str) -> None:
    assert blend(codec_tokens) == shown


def test_nothing_transferred_hides_everything() -> None:
    assert Ledger(1.0).transfer_hidden_share == 1.0
