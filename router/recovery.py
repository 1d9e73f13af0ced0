"""Whether a request is tried again after a worker failed it, and when. Pure; one :class:`Retries` per request."""

from __future__ import annotations

from dataclasses import dataclass

from baton.errors import BatonError, DeadlineExceeded, Overloaded, Unavailable

PAUSES_S = (0.0, 0.05, 0.2, 0.5)  # before the first, second, ... attempt in a row that brought no token
NO_ROOM_PAUSE_S = 0.05  # until the next look whether a worker has come or has room


class NoWorker(Unavailable):
    """Nobody of a role is connected; nothing was tried. ``lost_s``: for how long it has been so; inf: for ever."""

    def __init__(self, message: str, *, lost_s: float, retry_after_ms: int = 0) -> None:
        super().__init__(message, retry_after_ms=retry_after_ms, reason="no_worker")
        self.lost_s = lost_s


@dataclass(frozen=True, slots=True)
class Patience:
    """How much a request may cost beyond one attempt."""

    retries: int  # attempts in a row, after the first, that bring no token
    wait_s: float  # longest wait for a worker that could take over


class Retries:
    """What one request has tried. A failure before anything was dispatched is the client's to repeat."""

    def __init__(self, patience: Patience, deadline_s: float) -> None:
        self._patience, self._deadline_s = patience, deadline_s
        self._fruitless = 0
        self._failed_s: float | None = None  # when the failures in a row began
        self._begun = False

    @property
    def begun(self) -> bool:
        """Whether some attempt has failed: what follows is recovery, which admission no longer refuses."""
        return self._begun

    def after(self, error: BatonError, *, progress: bool, now_s: float) -> float:
        """Seconds until the next attempt. Raises ``error`` where there is none.

        progress: the attempt that ``error`` ended brought tokens of a decode worker. Lost workers and handoffs are
        tried again, a handoff whose lease ran out too, while the request has time. So is a new request that finds no
        worker when some were lost so lately that others may be on their way. What a worker says of the request itself
        is final, and so is a lack of room before the first attempt.
        """
        if not self._repeatable(error):
            raise error
        if progress or self._failed_s is None:
            self._fruitless, self._failed_s = 0, now_s
        self._begun = True
        waits = isinstance(error, NoWorker | Overloaded)
        self._fruitless += not waits
        if self._fruitless > self._patience.retries or now_s - self._failed_s > self._patience.wait_s:
            raise error
        pause_s = NO_ROOM_PAUSE_S if waits else PAUSES_S[min(self._fruitless, len(PAUSES_S)) - 1]
        if now_s + pause_s >= self._deadline_s:
            raise DeadlineExceeded("the request's time is used up", field="budget_ms")
        return pause_s

    def _repeatable(self, error: BatonError) -> bool:
        if isinstance(error, NoWorker) and error.lost_s < self._patience.wait_s:
            return True
        if isinstance(error, NoWorker | Overloaded):
            return self._begun
        return isinstance(error, Unavailable | DeadlineExceeded)
