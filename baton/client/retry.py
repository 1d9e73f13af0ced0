"""Whether and when a failed call is made again. Pure.

Only what cannot have been answered in part is repeated, only where the server's state may change by itself (it is busy,
or a worker or link is gone), and only while the deadline leaves time for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from baton.errors import BatonError, DeadlineExceeded, InvalidRequest, Overloaded, Unavailable


@dataclass(frozen=True, slots=True)
class Retry:
    """How a client repeats calls: ``attempts`` in all, 1 for never again.

    The server's "come back in N ms" is obeyed; where an unavailable server says nothing, the pause starts at
    ``first_pause_s`` and doubles up to ``longest_pause_s``. Every pause is stretched by up to ``spread`` of itself at
    random, so that clients refused together do not come back together.
    """

    attempts: int = 4
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0
    spread: float = 0.25

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise InvalidRequest("retry.attempts", f"is {self.attempts}, allowed: at least 1")
        if not 0.0 < self.first_pause_s <= self.longest_pause_s:
            raise InvalidRequest(
                "retry.first_pause_s", f"is {self.first_pause_s}, allowed: above 0, to longest_pause_s"
            )
        if not 0.0 <= self.spread <= 1.0:
            raise InvalidRequest("retry.spread", f"is {self.spread}, allowed: [0, 1]")


class Attempts:
    """One call's attempts until its deadline. Times are seconds of one monotonic clock."""

    def __init__(self, retry: Retry, deadline_s: float) -> None:
        self._retry, self._deadline_s = retry, deadline_s
        self._made = 0

    def begin(self, now_s: float) -> float:
        """Seconds left for the attempt that begins now. Raises :class:`DeadlineExceeded` when there are none."""
        if now_s >= self._deadline_s:
            raise DeadlineExceeded("the call's time is used up", field="timeout_s")
        self._made += 1
        return self._deadline_s - now_s

    def pause_s(self, error: BatonError, now_s: float, *, delivered: bool, chance: float) -> float:
        """How long to wait before the next attempt; raises ``error`` where there must be none.

        delivered: the caller has seen a part of the answer. chance: uniform in [0, 1).
        """
        pause_s = self._wanted_s(error)
        if delivered or pause_s is None or self._made >= self._retry.attempts:
            raise error
        pause_s *= 1.0 + self._retry.spread * chance
        if now_s + pause_s >= self._deadline_s:
            raise error
        return pause_s

    def _wanted_s(self, error: BatonError) -> float | None:
        hint_s = error.retry_after_ms / 1e3
        if isinstance(error, Overloaded):
            # Without a hint it is a limit of gRPC's, such as a message that is too large: it will be so again.
            return hint_s or None
        if isinstance(error, Unavailable):
            backoff_s = self._retry.first_pause_s * float(2 ** min(self._made - 1, 30))
            return hint_s or min(backoff_s, self._retry.longest_pause_s)
        return None


def seconds(given: float | None, default_s: float) -> float:
    """The time that a call may take. Raises :class:`InvalidRequest` for one that is not above 0."""
    if given is None:
        return default_s
    if not 0.0 < given < math.inf:
        raise InvalidRequest("timeout_s", f"is {given}, allowed: above 0")
    return given


def budget_ms(left_s: float) -> int:
    """What the server is told of the time left: at least 1 ms, as the contract has it."""
    return max(1, math.ceil(1e3 * left_s))
