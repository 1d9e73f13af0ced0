"""Who gets in, in which order, and who is sent away."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.messages import Load
from router.admission import MAX_RETRY_S, Admission, Claim, Dropped
from router.policy import WorkerView
from router.predict import Learned, Outlook

TOKEN_S = 0.001


def decode_view(running: int = 0, **held: float) -> WorkerView:
    fields = {"waiting": 0, "waiting_tokens": 0, "running": running, "pages_used": 0, "pages_total": 100}
    fields |= {"handoffs": 0, "buffer_bytes_used": 0, "buffer_bytes_total": 0, "buffer_bytes_quarantined": 0}
    return WorkerView("d", Load(**(fields | held)))  # type: ignore[arg-type]


def workers(backlog_s: float = 0.5, running: int = 1, learned: Learned = Learned(seat_s=1.0)) -> Outlook:  # noqa: B008
    """A prompt pool of a thousand tokens a second, and a batch whose steps take 10 ms for each sequence."""
    views = (decode_view(running, step_s=0.0, sequence_s=0.01),)
    return Outlook(views, TOKEN_S, TOKEN_S, backlog_s, busy=True, learned=learned)


UNKNOWN = Outlook((decode_view(1),), busy=True)


def claim(number: int, **fields: object) -> Claim:
    values = {"slo_class": "c", "priority": 0, "arrived_s": 0.0, "deadline_s": 600.0, "prompt_tokens": 100} | fields
    return Claim(number, **values)  # type: ignore[arg-type]


def admission(**fields: object) -> Admission:
    return Admission(**({"max_waiting": 8, "aging_s": 5.0, "lead_s": 0.25} | fields))  # type: ignore[arg-type]


def reasons(dropped: list[Dropped]) -> list[tuple[int, str]]:
    return [(one.claim.number, one.reason) for one in dropped]


# ---- who gets in


def test_while_nothing_is_measured_everybody_gets_in() -> None:
    line = admission()
    for number in range(8):
        assert not line.offer(claim(number, ttft_s=1e-3, tpot_s=1e-6), UNKNOWN, 0.0)
    assert line.ttft_s(line.waiting[-1], UNKNOWN, 0.0) == 0.0


def test_a_prediction_beyond_the_objective_refuses_with_the_time_that_is_lacking() -> None:
    line = admission()
    (dropped,) = line.offer(claim(1, ttft_s=0.4), workers(0.5), 0.0)
    assert (dropped.reason, line.waiting) == ("ttft", [])
    assert dropped.retry_after_s == pytest.approx(0.5 + 0.1 - 0.4)
    assert dropped.message == "the first token is expected in 600 ms, class 'c' promises 400 ms"
    assert not line.offer(claim(2, ttft_s=0.7), workers(0.5), 0.0)


def test_time_that_has_passed_since_arrival_counts() -> None:
    assert reasons(admission().offer(claim(1, ttft_s=0.7), workers(0.5), 0.15)) == [(1, "ttft")]


def test_the_deadline_is_an_objective_too() -> None:
    (dropped,) = admission().offer(claim(1, deadline_s=0.3), workers(0.5), 0.0)
    assert (dropped.reason, dropped.message) == (
        "deadline",
        "the first token is expected in 600 ms, the deadline is in 300 ms",
    )


def test_what_is_predicted_wrongly_never_locks_an_idle_service() -> None:
    idle = Outlook((decode_view(step_s=9.0),), token_s=9.0, fastest_s=9.0)
    assert not admission().offer(claim(1, ttft_s=0.1, tpot_s=0.1), idle, 0.0)


def test_whoever_finds_the_service_idle_begins_however_little_time_he_has() -> None:
    line, idle = admission(), Outlook((decode_view(),), token_s=1.0, fastest_s=1.0)
    hasty = claim(1, deadline_s=0.001)
    assert not line.offer(hasty, idle, 0.0)
    assert not line.overdue(idle, 0.0)
    assert line.take(idle, 0.0) == hasty
    assert not line.offer(claim(2, deadline_s=900.0), idle, 0.0)
    assert reasons(line.overdue(idle, 899.0)) == [(2, "shed")], "somebody is under way"


def test_the_line_ahead_counts() -> None:
    line = admission()
    assert not line.offer(claim(1, prompt_tokens=1000), workers(0.5), 0.0)
    assert reasons(line.offer(claim(2, arrived_s=60.0, ttft_s=1.5), workers(0.5), 60.0)) == [(2, "ttft")]
    assert not line.offer(claim(3, arrived_s=60.0, ttft_s=1.7), workers(0.5), 60.0)


def test_a_batch_without_a_seat_refuses_by_its_pace() -> None:
    full = workers(0.0, running=5, learned=Learned(seat_s=10.0))
    assert reasons(admission().offer(claim(1, ttft_s=1.0, tpot_s=0.05), full, 0.0)) == [(1, "tpot")]
    assert not admission().offer(claim(1, ttft_s=3.0, tpot_s=0.05), full, 0.0)  # a fifth of 10 s
    assert not admission().offer(claim(1, ttft_s=1.0, tpot_s=0.06), full, 0.0)


def test_a_pace_that_not_even_a_batch_of_one_has_is_refused() -> None:
    (dropped,) = admission().offer(claim(1, tpot_s=0.005), workers(), 0.0)
    assert (dropped.reason, dropped.message) == ("tpot", "a token is expected every 10 ms, class 'c' promises 5 ms")


def test_a_newcomer_must_not_spoil_the_pace_of_those_under_way() -> None:
    line = admission()
    line.offer(claim(1, tpot_s=0.03), workers(0.0, running=2), 0.0)
    assert line.take(workers(0.0, running=2), 0.0)
    full = workers(0.0, running=3)
    assert not line.offer(claim(2), full, 0.0)
    assert line.take(full, 0.0) is None
    line.leave(claim(1, tpot_s=0.03))
    assert line.take(full, 0.0) == claim(2)


def test_a_newcomer_must_not_spoil_the_first_token_of_those_who_wait() -> None:
    line = admission()
    assert not line.offer(claim(1, ttft_s=2.0, prompt_tokens=1000), workers(0.5), 0.0)
    (dropped,) = line.offer(claim(2, ttft_s=1.9, prompt_tokens=1000), workers(0.5), 0.0)
    assert (dropped.claim.number, dropped.reason) == (2, "ttft")
    assert dropped.message == "to serve class 'c' in time would make another request late"


def test_a_newcomer_of_a_higher_class_displaces_a_lower_one() -> None:
    line = admission()
    assert not line.offer(claim(1, ttft_s=2.0, prompt_tokens=1000), workers(0.5), 0.0)
    assert reasons(line.offer(claim(2, priority=1, ttft_s=1.9, prompt_tokens=1000), workers(0.5), 0.0)) == [(1, "shed")]
    assert [one.number for one in line.waiting] == [2]


def test_a_full_line_refuses_at_once_with_the_time_to_drain() -> None:
    line = admission(max_waiting=2)
    for number in range(2):
        assert not line.offer(claim(number), workers(0.5), 0.0)
    (dropped,) = line.offer(claim(2), workers(0.5), 0.0)
    assert (dropped.reason, dropped.message) == ("line_full", "2 requests are waiting already")
    assert dropped.retry_after_s == pytest.approx(0.5 + 2 * 0.1)
    (dropped,) = line.offer(claim(3), workers(1e4), 0.0)
    assert dropped.retry_after_s == MAX_RETRY_S


@pytest.mark.parametrize("predict", [True, False])
def test_in_a_full_line_a_higher_priority_takes_the_place_of_the_lowest(predict: bool) -> None:
    line = admission(max_waiting=4, predict=predict)
    for number, priority in enumerate((0, -10, -10, 5)):
        assert not line.offer(claim(number, priority=priority), workers(0.5), 0.0)
    assert reasons(line.offer(claim(4, priority=-10), workers(0.5), 0.0)) == [(4, "line_full")]  # nobody is below
    assert reasons(line.offer(claim(5, priority=10), workers(0.5), 0.0)) == [(2, "shed")]  # the last of the lowest
    assert reasons(line.offer(claim(6, priority=5), workers(0.5), 0.0)) == [(1, "shed")]
    assert reasons(line.offer(claim(7, priority=0), workers(0.5), 0.0)) == [(7, "line_full")]  # its equals stay
    assert reasons(line.offer(claim(8, priority=1), workers(0.5), 0.0)) == [(0, "shed")]
    assert [one.number for one in line.waiting] == [5, 3, 6, 8]


def test_in_a_full_line_nobody_gives_way_to_whom_comes_too_late_anyway() -> None:
    line = admission(max_waiting=1)
    assert not line.offer(claim(1, priority=-10), workers(0.5), 0.0)
    assert reasons(line.offer(claim(2, priority=10, ttft_s=0.4), workers(0.5), 0.0)) == [(2, "ttft")]
    assert reasons(line.offer(claim(3, priority=10, tpot_s=0.005), workers(0.5), 0.0)) == [(3, "tpot")]
    assert [one.number for one in line.waiting] == [1]


def test_without_prediction_only_the_bound_refuses() -> None:
    line = admission(predict=False, max_waiting=1)
    assert not line.offer(claim(1, ttft_s=1e-3, tpot_s=1e-6), workers(9.0), 0.0)
    assert not line.overdue(workers(9.0), 5.0)
    assert reasons(line.offer(claim(2), workers(9.0), 0.0)) == [(2, "line_full")]


# ---- whose turn it is


def test_deadlines_order_the_line_and_priority_counts_as_time() -> None:
    line = admission()
    offered = [claim(1, ttft_s=20.0), claim(2, ttft_s=10.0), claim(3, ttft_s=20.0, priority=3), claim(4)]
    for one in offered:
        assert not line.offer(one, workers(0.0), 0.0)
    assert [one.number for one in line.waiting] == [3, 2, 1, 4]


def test_waiting_wins_over_priority_in_time() -> None:
    line = admission()
    line.offer(claim(1, arrived_s=0.0, priority=-2), workers(0.0), 0.0)
    line.offer(claim(2, arrived_s=9.9), workers(0.0), 9.9)
    line.offer(claim(3, arrived_s=10.1), workers(0.0), 10.1)
    assert [one.number for one in line.waiting] == [2, 1, 3]


def test_workers_get_a_little_ahead_and_the_rest_waits() -> None:
    line = admission()
    for number in range(5):
        line.offer(claim(number), workers(0.0), 0.0)
    taken = []
    while (one := line.take(workers(0.0), 0.0)) is not None:
        taken.append(one.number)
    assert taken == [0, 1, 2]  # 0.3 s of prompts; the next one comes when less than 0.25 s are left
    line.first(claim(0), 0.0)
    assert line.take(workers(0.2), 0.0) == claim(3)
    assert line.take(workers(0.3), 0.0) is None


def test_nobody_to_take() -> None:
    assert admission().take(workers(), 0.0) is None


def test_an_idle_service_takes_whoever_is_first_whatever_it_measured() -> None:
    line = admission()
    line.offer(claim(1, sequences=5), workers(), 0.0)
    idle = Outlook((decode_view(step_s=9.0),), token_s=9.0, fastest_s=9.0)
    assert line.take(idle, 0.0) == claim(1, sequences=5)


def test_who_leaves_makes_room_wherever_he_was() -> None:
    line = admission()
    line.offer(claim(1), workers(0.0), 0.0)
    line.offer(claim(2), workers(0.0), 0.0)
    assert line.take(workers(0.0), 0.0) == claim(1)
    line.leave(claim(2))
    line.leave(claim(1))
    assert (line.waiting, line._begun, line._unanswered) == ([], {}, {})


def test_first_tokens_that_do_not_come_hold_the_line_and_count_as_backlog() -> None:
    line, free = admission(), workers(0.0)
    for number in range(3):
        line.offer(claim(number, ttft_s=4.0), free, 0.0)
    assert line.take(free, 0.0) == claim(0, ttft_s=4.0)  # expected after 0.1 s
    assert line.take(free, 0.3) == claim(1, ttft_s=4.0)
    assert line.take(free, 0.6) is None
    late = claim(3, arrived_s=3.1, ttft_s=3.0)
    assert reasons(line.offer(late, free, 3.1)) == [(3, "ttft")]  # nothing has come for three seconds
    line.first(claim(0), 3.1)
    assert not line.offer(late, free, 3.1)
    assert line.take(free, 3.2) is not None


def test_a_stall_that_cannot_be_measured_is_none() -> None:
    line = admission()
    line.offer(claim(1), UNKNOWN, 0.0)
    assert line.take(UNKNOWN, 0.0)
    assert line.ttft_s(claim(2), workers(0.0), 100.0) == pytest.approx(0.1)


# ---- who is sent away later


def test_what_can_no_longer_be_met_is_shed_lowest_class_first_then_least_slack() -> None:
    line = admission()
    for one in (
        claim(1, ttft_s=3.0, prompt_tokens=500),
        claim(2, ttft_s=3.1, prompt_tokens=500, priority=-1),
        claim(3, ttft_s=4.0, prompt_tokens=500, priority=1),
        claim(4, ttft_s=30.0),
    ):
        assert not line.offer(one, workers(0.5), 0.0)
    assert not line.overdue(workers(0.5), 0.5)
    assert reasons(line.overdue(workers(2.9), 0.5)) == [(1, "shed"), (2, "shed")]
    assert [one.number for one in line.waiting] == [3, 4]


def test_a_lower_class_makes_way_for_one_behind_it_that_would_be_late() -> None:
    line = admission(aging_s=0.1)
    line.offer(claim(1, priority=-1, ttft_s=3.9, prompt_tokens=1000), workers(0.5), 0.0)
    line.offer(claim(2, ttft_s=4.0, prompt_tokens=1000), workers(0.5), 0.0)
    assert reasons(line.overdue(workers(2.5), 0.0)) == [(1, "shed")]
    assert [one.number for one in line.waiting] == [2]


def test_shedding_is_slower_than_refusing() -> None:
    """A cautious factor keeps newcomers out, but does not send away who may still make it."""
    careful = workers(0.5, learned=Learned(ttft_factor=2.0))
    line = admission()
    assert reasons(line.offer(claim(1, ttft_s=1.0), careful, 0.0)) == [(1, "ttft")]
    line.offer(claim(2, ttft_s=1.0), workers(0.5), 0.0)
    assert not line.overdue(careful, 0.0)
    assert not admission().overdue(careful, 0.0)


CLAIMS = st.lists(
    st.tuples(st.integers(1, 2000), st.floats(0.05, 8.0), st.integers(-3, 3), st.floats(0.0, 0.3), st.integers(1, 3)),
    max_size=40,
)


@settings(deadline=None)  # the machine may be busy
@given(CLAIMS, st.floats(0.0, 2.0), st.integers(0, 8))
def test_whoever_is_let_in_would_be_in_time_and_the_line_is_in_order(
    asked: list[tuple[int, float, int, float, int]], backlog_s: float, running: int
) -> None:
    line, now_s, gone = admission(max_waiting=16), 0.0, set[int]()
    outlook = workers(backlog_s, running)
    for number, (tokens, ttft_s, priority, pause_s, sequences) in enumerate(asked):
        now_s += pause_s
        newcomer = claim(
            number, arrived_s=now_s, ttft_s=ttft_s, priority=priority, prompt_tokens=tokens, sequences=sequences,
            tpot_s=0.1,
        )  # fmt: skip
        before = {one.number for one in line.waiting}
        dropped = line.offer(newcomer, outlook, now_s)
        now = {one.number for one in line.waiting}
        lost = {one.claim.number for one in dropped}
        assert now == (before | {number}) - lost
        assert len(line.waiting) <= line.max_waiting
        assert not lost & gone
        gone |= lost
        for one in dropped:
            assert 0.0 < one.retry_after_s <= MAX_RETRY_S
            assert one.claim.number == number or one.claim.priority < priority
        assert line.waiting == sorted(line.waiting, key=lambda one: one.rank(line.aging_s))
    line.overdue(outlook, now_s)
    for kept in line.waiting:
        assert now_s + line.ttft_s(kept, outlook, now_s) <= kept.due_s + 1e-9


@given(CLAIMS)
def test_everybody_who_is_let_in_gets_his_turn(asked: list[tuple[int, float, int, float, int]]) -> None:
    line = admission(max_waiting=64, predict=False)
    for number, (tokens, _, priority, _, sequences) in enumerate(asked):
        assert not line.offer(
            claim(number, priority=priority, prompt_tokens=tokens, sequences=sequences), workers(), 0.0
        )
    order = []
    while line.waiting:
        one = line.take(workers(0.0, running=0)._replace(busy=False), 0.0)
        assert one is not None, "nothing is under way, and still nobody may go"
        order.append(one)
        line.first(one, 0.0)
        line.leave(one)
    assert order == sorted(order, key=lambda one: one.rank(line.aging_s))
    assert len(order) == len(asked)
