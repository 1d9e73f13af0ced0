"""When a failed request is tried again: pure decisions."""

from __future__ import annotations

import math

import pytest

from baton.errors import BatonError, DeadlineExceeded, Internal, InvalidRequest, Overloaded, Unavailable
from router.recovery import NO_ROOM_PAUSE_S, PAUSES_S, NoWorker, Patience, Retries

LOST = Unavailable("decode worker lost")
NOBODY = NoWorker("no decode worker is connected", lost_s=math.inf)


def retries(count: int = 3, wait_s: float = 30.0, deadline_s: float = 1000.0) -> Retries:
    return Retries(Patience(count, wait_s), deadline_s)


def test_attempts_in_a_row_without_a_token_are_counted_and_spaced() -> None:
    mine = retries(3)
    assert [mine.after(LOST, progress=False, now_s=now_s) for now_s in (0.0, 1.0, 2.0)] == list(PAUSES_S[:3])
    with pytest.raises(Unavailable, match="lost"):
        mine.after(LOST, progress=False, now_s=3.0)


def test_progress_begins_the_row_anew() -> None:
    mine = retries(1)
    for now_s in range(100):
        assert mine.after(LOST, progress=True, now_s=float(now_s)) == 0.0
    with pytest.raises(Unavailable):
        mine.after(LOST, progress=False, now_s=101.0)


def test_no_retries_at_all() -> None:
    with pytest.raises(Unavailable):
        retries(0).after(LOST, progress=True, now_s=0.0)


@pytest.mark.parametrize("error", [InvalidRequest("prompt", "wrong"), Internal("a bug")])
def test_what_a_worker_says_of_the_request_is_final(error: BatonError) -> None:
    mine = retries()
    mine.after(LOST, progress=True, now_s=0.0)
    with pytest.raises(type(error)):
        mine.after(error, progress=False, now_s=0.0)


@pytest.mark.parametrize("error", [NOBODY, Overloaded("full")])
def test_lack_of_room_is_final_at_first_and_waited_out_later(error: BatonError) -> None:
    with pytest.raises(type(error)):
        retries().after(error, progress=False, now_s=0.0)
    mine = retries(1, wait_s=2.0)
    mine.after(LOST, progress=True, now_s=0.0)
    assert mine.begun
    for tenth in range(20):
        assert mine.after(error, progress=False, now_s=tenth / 10) == NO_ROOM_PAUSE_S
    with pytest.raises(type(error)):
        mine.after(error, progress=False, now_s=2.1)


def test_an_expired_lease_is_tried_again_while_the_request_has_time() -> None:
    assert retries(deadline_s=10.0).after(DeadlineExceeded("lease"), progress=False, now_s=1.0) == 0.0
    with pytest.raises(DeadlineExceeded, match="budget_ms"):
        retries(deadline_s=10.0).after(LOST, progress=True, now_s=10.0)


def test_a_new_request_waits_for_whoever_replaces_workers_lost_lately() -> None:
    mine = retries(0, wait_s=5.0)
    lately = NoWorker("no decode worker is connected", lost_s=1.0)
    for tenth in range(50):
        assert mine.after(lately, progress=False, now_s=tenth / 10) == NO_ROOM_PAUSE_S
    with pytest.raises(NoWorker):
        mine.after(lately, progress=False, now_s=5.1)
    with pytest.raises(NoWorker):
        retries(wait_s=5.0).after(NoWorker("no decode worker is connected", lost_s=6.0), progress=False, now_s=0.0)
