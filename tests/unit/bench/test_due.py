"""Tokens that say when they were due."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.due import CYCLE, FIRST_ID, late_s, token_due


@given(st.floats(0.0, 1e7), st.floats(0.0, 3.9))
def test_a_token_tells_how_late_it_is(at_s: float, delay_s: float) -> None:
    token = token_due(at_s)
    assert FIRST_ID <= token < FIRST_ID + CYCLE
    assert late_s(token, at_s + delay_s) == pytest.approx(delay_s, abs=2e-4)
