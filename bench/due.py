"""Tokens whose ids say when they were due, by the machine's monotonic clock, so that its clients know how late."""

from __future__ import annotations

FIRST_ID, CYCLE = 1000, 40_000  # ids of ordinary tokens, one for each tenth of a millisecond: all of them in 4 s


def token_due(at_s: float) -> int:
    """The token that was due at ``at_s``."""
    return FIRST_ID + round(at_s * 1e4) % CYCLE


def late_s(token: int, now_s: float) -> float:
    """How long ago ``token`` was due; right for up to 4 s."""
    return ((round(now_s * 1e4) - (token - FIRST_ID)) % CYCLE) / 1e4
