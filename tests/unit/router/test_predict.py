"""Predictions from pushed loads, and what corrects them."""

from __future__ import annotations

import math

import pytest

from baton.messages import Load
from router.policy import WorkerView
from router.predict import (
    FADE_S,
    KEPT,
    MOST,
    MOST_FIRST_S,
    Factor,
    Learned,
    Learner,
    Mean,
    Outlook,
    Timeline,
    outlook,
)


def view(name: str = "w", unseen: int = 0, **held: float) -> WorkerView:
    fields = {"waiting": 0, "waiting_tokens": 0, "running": 0, "pages_used": 0, "pages_total": 100, "handoffs": 0}
    fields |= {"buffer_bytes_used": 0, "buffer_bytes_total": 0, "buffer_bytes_quarantined": 0}
    return WorkerView(name, Load(**(fields | held)), unseen, 0, 0)  # type: ignore[arg-type]


BATCH = {"step_s": 0.02, "sequence_s": 0.01}


def test_nothing_measured_predicts_nothing() -> None:
    fresh = outlook([view(waiting_tokens=500)], [view(running=3)], Learned(seat_s=1.0))
    assert (fresh.token_s, fresh.tpot_s(1), fresh.tpot_alone_s) == (0.0, 0.0, 0.0)
    assert fresh.seats(0.1) == (math.inf, math.inf)
    assert Timeline(fresh).first_token_s(100, 1, 0.1) == 0.0
    assert not fresh.idle
    assert outlook([], [], Learned()).idle
    assert outlook([], [], Learned()).seats(0.1) == (math.inf, math.inf)


def test_one_worker_that_measured_nothing_leaves_the_pool_unknown() -> None:
    assert outlook([view(prompt_token_s=0.001), view()], [], Learned()).token_s == 0.0


def test_the_pool_is_as_fast_as_all_its_workers_together() -> None:
    pool = [view(prompt_token_s=0.002, waiting_tokens=100), view(prompt_token_s=0.001, waiting_tokens=400)]
    seen = outlook(pool, [view()], Learned())
    assert seen.token_s == pytest.approx(1 / 1500)
    assert (seen.fastest_s, seen.pushed_s) == (0.001, 0.2)
    assert seen.backlog_s == 0.2


def test_what_was_sent_from_here_counts_before_workers_tell() -> None:
    seen = Outlook((view(**BATCH),), token_s=0.001, fastest_s=0.001, own_tokens=700, own_sequences=2)
    assert seen.backlog_s == pytest.approx(0.7)
    assert seen._replace(progress_s=0.5).backlog_s == pytest.approx(0.2)
    assert seen._replace(progress_s=5.0, stalled_s=3.0).backlog_s == 3.0
    assert not seen.idle
    free, total = seen.seats(0.061)
    assert (free, total) == (2.0, 4.0)


def test_a_prompt_waits_for_those_before_it_and_costs_its_own_tokens() -> None:
    seen = outlook([view(prompt_token_s=0.001, waiting_tokens=300)], [view(**BATCH)], Learned(2.0, first_s=0.05))
    line = Timeline(seen)
    assert line.first_token_s(100, 1, math.inf) == pytest.approx(2.0 * (0.3 + 0.1 + 0.05))
    line.place(200, 1)
    assert line.first_token_s(100, 1, math.inf) == pytest.approx(2.0 * (0.3 + 0.2 + 0.1 + 0.05))
    line.place(-200, -1)
    assert line.first_token_s(100, 1, math.inf) == pytest.approx(2.0 * (0.3 + 0.1 + 0.05))


def test_without_prefill_workers_the_decode_workers_are_those_that_compute_prompts() -> None:
    assert outlook([], [view(prompt_token_s=0.003)], Learned()).token_s == pytest.approx(0.003)


def test_a_batch_has_the_seats_that_keep_tpot() -> None:
    seen = outlook([], [view(running=3, **BATCH), view(running=1, **BATCH)], Learned())
    assert seen.seats(0.061) == (4.0, 8.0)
    assert seen.seats(0.001) == (-2.0, 2.0)  # one each, whatever the objective
    assert seen.seats(math.inf) == (math.inf, math.inf)
    assert seen.tpot_s(1) == pytest.approx(0.04)
    assert seen.tpot_alone_s == pytest.approx(0.03)
    strict = outlook([], [view(running=3, **BATCH)], Learned(tpot_factor=2.0))
    assert strict.seats(0.061) == (-2.0, 1.0)
    assert strict.tpot_s(0) == pytest.approx(0.1)


def test_without_a_slope_all_or_one_fits() -> None:
    flat = outlook([], [view(step_s=0.05)], Learned())
    assert flat.seats(0.06) == (math.inf, math.inf)
    assert flat.seats(0.04) == (1.0, 1.0)


def test_pages_bound_seats_too() -> None:
    assert outlook([], [view(running=4, pages_used=50)], Learned()).seats(math.inf) == (4.0, 8.0)


def test_who_finds_no_seat_waits_for_one() -> None:
    workers = [view(running=4, prompt_token_s=0.001, **BATCH)]
    line = Timeline(outlook([], workers, Learned(seat_s=2.0)))
    assert line.seat_s(1, 0.061) == pytest.approx(2.0 / 4)
    assert line.seat_s(1, math.inf) == 0.0
    line.place(0, 3)
    assert line.seat_s(1, 0.061) == pytest.approx(4 * 2.0 / 4)
    assert line.seat_s(9, 0.061) == pytest.approx(7 * 2.0 / 4)  # more than there are: all of them
    assert line.first_token_s(100, 1, 0.061) == pytest.approx(2.0 + 0.1)


def test_a_factor_settles_where_the_share_of_kept_predictions_is_right() -> None:
    factor, kept = Factor(), list[bool]()
    for round_ in range(3000):
        seen_s = 0.5 + (round_ * 37 % 100) / 100  # evenly in [0.5, 1.5) of what the model says
        promised_s = factor.at(float(round_) * 0.01)
        kept.append(seen_s <= promised_s)
        factor.observe(promised_s, seen_s, round_ * 0.01)
    assert sum(kept[1000:]) / 2000 == pytest.approx(KEPT, abs=0.03)


def test_a_factor_is_bounded_both_ways_and_fades() -> None:
    factor = Factor()
    for _ in range(500):
        factor.observe(1.0, 9.0, 10.0)
    assert factor.at(10.0) == pytest.approx(MOST)
    assert factor.at(10.0 + FADE_S) == pytest.approx(math.sqrt(MOST))
    assert factor.at(5.0) == pytest.approx(MOST)  # a clock that seems to go back changes nothing
    for _ in range(5000):
        factor.observe(1.0, 0.1, 10.0)
    assert factor.at(10.0) == pytest.approx(1 / MOST)


def test_a_mean_begins_with_its_first() -> None:
    mean = Mean()
    assert mean.value == 0.0
    mean.observe(2.0)
    assert mean.value == 2.0
    mean.observe(3.0)
    assert mean.value == pytest.approx(2.1)


def test_what_requests_saw_is_gathered() -> None:
    learner = Learner()
    assert learner.at(0.0) == Learned()
    learner.first_token(0.0, 5.0, 1.0)  # nothing was promised
    learner.pace(0.0, 5.0, 1.0)
    assert learner.at(1.0) == Learned()
    learner.first_token(1.0, 2.0, 1.0)
    learner.pace(1.0, 0.5, 1.0)
    learner.unhindered(0.1, 0.3)
    learner.left(4.0)
    learned = learner.at(1.0)
    assert learned.ttft_factor > 1.0 > learned.tpot_factor
    assert (learned.first_s, learned.seat_s) == (pytest.approx(0.2), 4.0)
    learner.unhindered(0.5, 0.4)  # cached more than was known: costs nothing
    assert learner.at(1.0).first_s == pytest.approx(0.18)
    outlier = Learner()
    outlier.unhindered(0.0, 99.0)
    assert outlier.at(0.0).first_s == MOST_FIRST_S
