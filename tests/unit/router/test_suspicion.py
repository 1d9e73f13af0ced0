"""What a router holds against a worker: pure decisions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.suspicion import FORGIVEN_S, ONE_EVENT_S, OPEN_S, SILENT_S, STRIKES, WINDOW_S, Suspicion


def trusted(now_s: float = 0.0) -> Suspicion:
    return Suspicion(now_s)


def strikes(worker: Suspicion, now_s: float, count: int = STRIKES) -> None:
    """That many events, the last at ``now_s``."""
    for before in reversed(range(count)):
        worker.strike(now_s - before * ONE_EVENT_S)
        worker.heard(now_s - before * ONE_EVENT_S)


def test_silence_is_two_heartbeats_long_and_ends_with_a_word() -> None:
    worker = trusted()
    assert not worker.shunned(SILENT_S)
    assert worker.shunned(SILENT_S + 0.01)
    worker.heard(5.0)
    assert not worker.shunned(5.5)


def test_a_few_failures_are_borne_and_more_open_the_breaker_for_a_while() -> None:
    worker = trusted()
    for _ in range(100):
        strikes(worker, 5.0, 1)
    assert not worker.shunned(5.0), "one event, however many requests it hit"
    strikes(worker, 7.0, STRIKES - 2)
    assert not worker.shunned(7.0)
    strikes(worker, 9.0, 1)
    assert worker.shunned(9.0)
    worker.heard(9.0 + OPEN_S[0])
    assert not worker.shunned(9.0 + OPEN_S[0])


def test_failures_far_apart_do_not_add_up() -> None:
    worker = trusted()
    for n in range(20):
        strikes(worker, n * WINDOW_S, 1)
        assert not worker.shunned(n * WINDOW_S)


def test_a_failed_trial_opens_it_at_once_and_for_longer_until_forgiven() -> None:
    worker, now_s = trusted(), 10.0
    strikes(worker, now_s)
    for open_s in OPEN_S[1:]:
        now_s += OPEN_S[0] + open_s  # later than the end of the last opening
        strikes(worker, now_s, 1)
        worker.heard(now_s + open_s - 0.1)
        assert worker.shunned(now_s + open_s - 0.1)
        worker.heard(now_s + open_s)
        assert not worker.shunned(now_s + open_s)
    now_s += FORGIVEN_S + OPEN_S[-1] + WINDOW_S
    strikes(worker, now_s)
    worker.heard(now_s + OPEN_S[0])
    assert not worker.shunned(now_s + OPEN_S[0])


@given(st.lists(st.floats(0.0, 500.0), max_size=40))
def test_nobody_is_shunned_for_ever(times: list[float]) -> None:
    worker = trusted()
    for now_s in sorted(times):
        strikes(worker, now_s, 1)
    end_s = max(times, default=0.0) + OPEN_S[-1]
    worker.heard(end_s)
    assert not worker.shunned(end_s)
