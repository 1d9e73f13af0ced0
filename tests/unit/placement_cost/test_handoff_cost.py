from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import ConfigError
from placement.handoff_cost import HandoffCost

COSTS = st.builds(
    HandoffCost,
    token_bytes=st.integers(100, 100_000),
    layers=st.integers(1, 100),
    wire_bytes_per_s=st.floats(1e6, 1e11),
    encode_bytes_per_s=st.floats(1e6, 1e11),
    decode_bytes_per_s=st.floats(1e6, 1e11),
    ratio=st.floats(1, 6),
    latency_s=st.floats(0, 0.01),
    encode_layer_s=st.floats(0, 1e-3),
    wire_layer_s=st.floats(0, 1e-3),
    decode_layer_s=st.floats(0, 1e-3),
)


def test_by_hand() -> None:
    cost = HandoffCost(1000, 10, 1e6, 2e6, 4e6, ratio=2.0, latency_s=0.001, wire_layer_s=0.002)
    assert cost.stages_s(100) == pytest.approx((0.05, 0.05 + 0.02, 0.025))
    assert cost.serial_s(100) == pytest.approx(0.146)
    assert cost.exposed_s(100, prefill_s=1.0) == pytest.approx(0.001 + 0.0145)
    assert cost.exposed_s(100, prefill_s=0.01) == pytest.approx(0.001 + 0.0145 + 0.06 * 0.9)


@settings(deadline=None)
@given(COSTS, st.integers(0, 100_000), st.floats(0, 10))
def test_exposed_is_part_of_serial_and_falls_with_prefill(cost: HandoffCost, tokens: int, prefill_s: float) -> None:
    exposed = cost.exposed_s(tokens, prefill_s)
    assert 0 <= exposed <= cost.serial_s(tokens) * (1 + 1e-9)
    assert cost.exposed_s(tokens, prefill_s + 1) <= exposed
    assert cost.serial_s(tokens + 1) > cost.serial_s(tokens)


def test_impossible_rates_are_named() -> None:
    with pytest.raises(ConfigError, match="wire_bytes_per_s"):
        HandoffCost(1, 1, 0.0)
