"""How much a tenant may ask for: token buckets of requests and of tokens per minute. Pure: the time is an argument.

A bucket holds a minute's worth and fills evenly. A request larger than the whole bucket passes when it is full and
leaves a debt, so that no limit makes some request impossible. A request counts before it is looked at, whatever becomes
of it, since looking at it is work already. Tokens are taken once they are counted, as if all that were asked for came;
what did not come is given back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from baton.api_keys import TenantLimits

MINUTE_S = 60.0
MAX_TENANTS = 4096  # buckets that are remembered beyond this are only those that are not full


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the tenant used up, and when enough of it is there again."""

    message: str
    retry_after_s: float


@dataclass(slots=True)
class _Bucket:
    capacity: int
    level: float
    filled_s: float

    def fill(self, now_s: float) -> None:
        elapsed_s = max(0.0, now_s - self.filled_s)
        self.level = min(float(self.capacity), self.level + elapsed_s * self.capacity / MINUTE_S)
        self.filled_s = max(self.filled_s, now_s)

    def lacking_s(self, amount: float) -> float:
        """Seconds until ``amount`` may be taken; 0: now."""
        short = min(amount, float(self.capacity)) - self.level
        return short * MINUTE_S / self.capacity if short > 1e-9 else 0.0

    @property
    def full(self) -> bool:
        return self.level >= self.capacity


@dataclass(slots=True)
class _Account:
    requests: _Bucket | None
    tokens: _Bucket | None
    limits: TenantLimits

    def fill(self, now_s: float) -> None:
        for bucket in (self.requests, self.tokens):
            if bucket is not None:
                bucket.fill(now_s)

    @property
    def full(self) -> bool:
        return all(bucket is None or bucket.full for bucket in (self.requests, self.tokens))


@dataclass(slots=True)
class Limits:
    """What every tenant has left. ``default`` holds for those without limits of their own, also the anonymous ""."""

    default: TenantLimits = field(default_factory=TenantLimits)
    _accounts: dict[str, _Account] = field(default_factory=dict)

    def refusal(self, tenant: str, now_s: float, own: TenantLimits | None = None) -> Refusal | None:
        """What :meth:`take_request` would say; takes nothing."""
        account = self._account(tenant, now_s, own or TenantLimits())
        return _short(account.requests if account else None, 1, "requests")

    def take_request(self, tenant: str, now_s: float, own: TenantLimits | None = None) -> Refusal | None:
        """Takes one request from ``tenant``, or says why not. own: the tenant's limits."""
        account = self._account(tenant, now_s, own or TenantLimits())
        return _take(account.requests if account else None, 1, "requests")

    def take_tokens(self, tenant: str, tokens: int, now_s: float, own: TenantLimits | None = None) -> Refusal | None:
        """Takes ``tokens`` from ``tenant``, or none at all and says why."""
        account = self._account(tenant, now_s, own or TenantLimits())
        return _take(account.tokens if account else None, tokens, "tokens")

    def give_back(self, tenant: str, tokens: int, now_s: float) -> None:
        """``tokens`` of those taken were never computed."""
        account = self._accounts.get(tenant)
        if account is not None and account.tokens is not None:
            account.fill(now_s)
            account.tokens.level = min(float(account.tokens.capacity), account.tokens.level + tokens)

    def _account(self, tenant: str, now_s: float, own: TenantLimits) -> _Account | None:
        """The tenant's buckets, filled up to now; None where nothing limits it."""
        limits = self.default if own == TenantLimits() else own
        if limits == TenantLimits():
            return None
        account = self._accounts.get(tenant)
        if account is None or account.limits != limits:
            self._forget_full(now_s)
            requests, tokens = (
                _Bucket(rate, float(rate), now_s) if rate else None
                for rate in (limits.requests_per_minute, limits.tokens_per_minute)
            )
            account = self._accounts[tenant] = _Account(requests, tokens, limits)
        account.fill(now_s)
        return account

    def _forget_full(self, now_s: float) -> None:
        """A full bucket is what a new tenant would get: nothing is lost with it."""
        if len(self._accounts) < MAX_TENANTS:
            return
        for account in self._accounts.values():
            account.fill(now_s)
        self._accounts = {tenant: account for tenant, account in self._accounts.items() if not account.full}


def _short(bucket: _Bucket | None, amount: int, what: str) -> Refusal | None:
    if bucket is None or not (wait_s := bucket.lacking_s(amount)):
        return None
    left = max(0, math.floor(bucket.level))
    return Refusal(f"{amount} {what} asked for, {left} left of {bucket.capacity} {what} per minute", wait_s)


def _take(bucket: _Bucket | None, amount: int, what: str) -> Refusal | None:
    refusal = _short(bucket, amount, what)
    if bucket is not None and refusal is None:
        bucket.level -= amount
    return refusal
