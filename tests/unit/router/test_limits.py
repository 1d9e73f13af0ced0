"""Token buckets of tenants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.api_keys import TenantLimits
from router import limits
from router.limits import Limits, Refusal


def take(tenants: Limits, tenant: str, tokens: int, now_s: float, own: TenantLimits | None = None) -> Refusal | None:
    """A request of so many tokens, as the router takes it."""
    refusal = tenants.take_request(tenant, now_s, own)
    return refusal or tenants.take_tokens(tenant, tokens, now_s, own)


def test_without_limits_nothing_is_refused_nor_remembered() -> None:
    free = Limits()
    assert all(take(free, "", 10**9, 0.0) is None for _ in range(100))
    free.give_back("", 5, 0.0)
    assert not free._accounts


def test_requests_per_minute() -> None:
    tenants = Limits(TenantLimits(requests_per_minute=2))
    assert take(tenants, "a", 1, 0.0) is None
    assert take(tenants, "a", 1, 0.0) is None
    refusal = take(tenants, "a", 1, 0.0)
    assert refusal is not None
    assert refusal.message == "1 requests asked for, 0 left of 2 requests per minute"
    assert refusal.retry_after_s == pytest.approx(30.0)
    assert take(tenants, "b", 1, 0.0) is None  # another tenant has a bucket of its own
    assert take(tenants, "a", 1, refusal.retry_after_s) is None


def test_tokens_per_minute_and_what_did_not_come() -> None:
    own = TenantLimits(tokens_per_minute=600)
    tenants = Limits(TenantLimits(tokens_per_minute=5))
    assert take(tenants, "a", 500, 0.0, own) is None
    refusal = take(tenants, "a", 200, 0.0, own)
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx(10.0)
    tenants.give_back("a", 100, 0.0)
    assert take(tenants, "a", 200, 0.0, own) is None
    tenants.give_back("a", 10**6, 0.0)  # never more than a minute's worth
    assert take(tenants, "a", 600, 0.0, own) is None
    assert take(tenants, "a", 1, 0.0, own) is not None


def test_a_request_larger_than_the_bucket_passes_when_it_is_full_and_leaves_a_debt() -> None:
    tenants = Limits(TenantLimits(tokens_per_minute=60))
    assert take(tenants, "a", 120, 0.0) is None
    refusal = take(tenants, "a", 1, 0.0)
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx(61.0)


def test_a_request_whose_tokens_are_refused_was_a_request() -> None:
    """Its tokens had to be counted to refuse them."""
    tenants = Limits(TenantLimits(requests_per_minute=2, tokens_per_minute=60))
    assert take(tenants, "a", 60, 0.0) is None
    refused = take(tenants, "a", 60, 0.0)
    assert refused is not None
    assert "tokens per minute" in refused.message
    refused = take(tenants, "a", 0, 0.0)
    assert refused is not None
    assert "requests per minute" in refused.message


def test_full_buckets_are_forgotten_and_changed_limits_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_TENANTS", 3)
    tenants = Limits(TenantLimits(requests_per_minute=60))
    for index in range(10):
        take(tenants, f"t{index}", 1, 10.0 * index)
    assert len(tenants._accounts) <= 3
    own = TenantLimits(requests_per_minute=1)
    assert take(tenants, "t9", 1, 90.0, own) is None
    assert take(tenants, "t9", 1, 90.0, own) is not None


@given(
    st.integers(1, 50),
    st.integers(1, 500),
    st.lists(st.tuples(st.floats(0.0, 20.0), st.integers(0, 100), st.booleans()), max_size=60),
)
def test_no_minute_gives_more_than_two_buckets_and_every_hint_is_kept(
    requests: int, tokens: int, asks: list[tuple[float, int, bool]]
) -> None:
    tenants = Limits(TenantLimits(requests, tokens))
    now_s, taken = 0.0, list[tuple[float, int]]()
    for pause_s, amount, waits in asks:
        now_s += pause_s
        refusal = take(tenants, "a", amount, now_s)
        if refusal is not None and waits:
            assert refusal.retry_after_s > 0.0
            for _ in range(3):  # the hint is for what was short first; the other, and then again requests, may be too
                now_s += refusal.retry_after_s + 1e-6
                refusal = take(tenants, "a", amount, now_s)
                if refusal is None:
                    break
            assert refusal is None
        if refusal is None:
            taken.append((now_s, amount))
    for begin_s, _ in taken:
        window = [amount for at_s, amount in taken if begin_s <= at_s < begin_s + 60.0]
        assert len(window) <= 2 * requests
        assert sum(window) <= 2 * tokens + 2 * max(window)
