"""When a failed call is made again: a pure decision."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.client.retry import Attempts, Retry, budget_ms, seconds
from baton.errors import BatonError, Cancelled, DeadlineExceeded, Internal, InvalidRequest, Overloaded, Unavailable

BUSY, GONE = Overloaded("busy", retry_after_ms=200), Unavailable("gone")


def begun(deadline_s: float = 100.0, attempts: int = 4, made: int = 1) -> Attempts:
    tries = Attempts(Retry(attempts=attempts), deadline_s)
    for _ in range(made):
        tries.begin(0.0)
    return tries


def test_the_servers_advice_is_obeyed_and_spread() -> None:
    assert begun().pause_s(BUSY, 0.0, delivered=False, chance=0.0) == 0.2
    assert begun().pause_s(BUSY, 0.0, delivered=False, chance=0.5) == pytest.approx(0.225)
    advised = Unavailable("restarting", retry_after_ms=3000)
    assert begun(made=2).pause_s(advised, 0.0, delivered=False, chance=0.0) == 3.0


@pytest.mark.parametrize(("made", "pause_s"), [(1, 0.1), (2, 0.2), (3, 0.4), (8, 5.0), (2000, 5.0)])
def test_without_advice_the_pause_doubles_up_to_a_limit(made: int, pause_s: float) -> None:
    tries = begun(attempts=made + 1, made=made)
    assert tries.pause_s(GONE, 0.0, delivered=False, chance=0.0) == pause_s


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("the message is too large"),  # gRPC's own: no hint, and it will be as large again
        Internal("a defect"),
        InvalidRequest("prompt", "is empty"),
        DeadlineExceeded("late"),
        Cancelled("left"),
    ],
)
def test_what_cannot_get_better_is_not_repeated(error: BatonError) -> None:
    with pytest.raises(type(error)) as raised:
        begun().pause_s(error, 0.0, delivered=False, chance=0.0)
    assert raised.value is error


def test_nothing_is_repeated_after_a_token_nor_beyond_the_attempts_nor_past_the_deadline() -> None:
    with pytest.raises(Overloaded):
        begun().pause_s(BUSY, 0.0, delivered=True, chance=0.0)
    with pytest.raises(Overloaded):
        begun(attempts=3, made=3).pause_s(BUSY, 0.0, delivered=False, chance=0.0)
    with pytest.raises(Overloaded):
        begun(deadline_s=10.0).pause_s(BUSY, 9.9, delivered=False, chance=0.0)
    with pytest.raises(DeadlineExceeded, match="timeout_s"):
        begun(deadline_s=10.0).begin(10.0)


@given(
    st.integers(1, 20), st.floats(0.001, 60.0), st.floats(0.0, 1.0, exclude_max=True),
    st.lists(st.integers(0, 5000), min_size=25, max_size=25),
)  # fmt: skip
def test_whatever_the_server_says_attempts_and_time_are_bounded(
    attempts: int, timeout_s: float, chance: float, hints_ms: list[int]
) -> None:
    tries, now_s, made = Attempts(Retry(attempts=attempts), timeout_s), 0.0, 0

    def failing() -> None:
        nonlocal now_s, made
        for hint_ms in hints_ms:
            tries.begin(now_s)
            made += 1
            gone = Unavailable("gone", retry_after_ms=hint_ms)
            now_s += tries.pause_s(gone, now_s, delivered=False, chance=chance)

    with pytest.raises(BatonError):
        failing()
    assert made <= attempts
    assert now_s < timeout_s


def test_times_are_checked() -> None:
    assert (seconds(None, 5.0), seconds(1.5, 5.0)) == (5.0, 1.5)
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InvalidRequest, match="timeout_s"):
            seconds(wrong, 5.0)
    assert (budget_ms(1e-9), budget_ms(0.0015)) == (1, 2)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"attempts": 0}, "attempts"),
        ({"first_pause_s": 0.0}, "first_pause_s"),
        ({"longest_pause_s": 0.01}, "first_pause_s"),
        ({"spread": math.nan}, "spread"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(fields: dict[str, float], name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"retry.{name}"):
        Retry(**fields)  # type: ignore[arg-type]
