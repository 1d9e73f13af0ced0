"""The prompt tokens of a mixed step follow what steps cost."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

import pytest

from engine.pace import REFRESH_STEPS, RETRY_STEPS, SLOW_TRIES, Pace


def served(cost_s: Callable[[int], float], steps: int, most: int = 512, gap_s: float = 0.0) -> list[int]:
    """The prompt tokens of ``steps`` mixed steps after one that only decodes, which takes a second more or less."""
    pace, shares = Pace(gap_s), []
    pace.observe(8, 0, cost_s(0))
    for _ in range(steps):
        shares.append(pace.mixed_tokens(most))
        pace.observe(8, shares[-1], cost_s(shares[-1]))
    return shares


def test_it_begins_with_one_block_and_doubles_while_prompts_are_cheap() -> None:
    assert served(lambda tokens: 1.0, 8) == [16, 32, 64, 128, 256, 512, 512, 512]


@pytest.mark.parametrize("token_s", [0.002, 0.005, 0.01, 0.02, 0.04])
def test_a_linear_cost_is_met_without_a_step_that_takes_twice_as_long(token_s: float) -> None:
    shares = served(lambda tokens: 1.0 + tokens * token_s, 20)
    assert max(shares) * token_s <= 0.8
    assert 0.8 / token_s - shares[-1] < 32  # of whole blocks the next would be too many, or just fit


@pytest.mark.parametrize("gap_s", [3.0, 6.0])
def test_a_gap_that_is_allowed_anyway_is_used(gap_s: float) -> None:
    shares = served(lambda tokens: 1.0 + tokens * 0.01, 20, gap_s=gap_s)
    assert max(shares) * 0.01 <= gap_s - 1.0
    assert (gap_s - 1.0) / 0.01 - shares[-1] < 32


def test_a_gap_shorter_than_the_stretch_changes_nothing() -> None:
    assert served(lambda tokens: 1.0 + tokens * 0.01, 20, gap_s=1.5) == served(lambda tokens: 1.0 + tokens * 0.01, 20)


def test_a_size_off_the_fast_path_is_tried_until_it_is_no_chance() -> None:
    shares = served(lambda tokens: 1.05 if tokens <= 48 else 5.0, RETRY_STEPS)
    assert shares[:3] == [16, 32, 64]
    assert shares.count(64) == SLOW_TRIES
    assert set(shares[4 * SLOW_TRIES :]) <= {48, 0}


def test_a_size_that_failed_is_tried_again_much_later() -> None:
    shares = served(lambda tokens: 1.05 if tokens <= 48 else 5.0, 3 * RETRY_STEPS)
    assert shares.count(64) == SLOW_TRIES + 2
    assert max(shares) == 64


def test_a_hiccup_costs_a_few_small_steps() -> None:
    hiccups = iter([1.05, 9.0])
    shares = served(lambda tokens: 1.0 if not tokens else next(hiccups, 1.05), 12)
    assert shares[:5] == [16, 32, 16, 32, 64]
    assert shares[-1] > 200


def test_a_machine_that_is_often_disturbed_keeps_most_of_its_share() -> None:
    noise = random.Random(0)
    shares = served(lambda tokens: 1.0 + tokens * 0.009 + (noise.random() < 0.05), 2000)
    assert statistics.fmean(shares) > 0.6 * 80


def test_a_size_that_failed_only_for_a_while_is_passed_later() -> None:
    slow = iter([True] * 9)
    shares = served(lambda tokens: 9.0 if tokens > 32 and next(slow, False) else 1.0 + tokens * 0.009, 6 * RETRY_STEPS)
    assert max(shares[20:RETRY_STEPS]) <= 48
    assert max(shares) == 80


def test_the_slow_rests_of_prompts_bound_nothing() -> None:
    pace = Pace()
    pace.observe(8, 0, 1.0)
    for _ in range(2 * SLOW_TRIES):
        pace.observe(8, 3, 9.0)
    for tokens in (16, 32, 64):
        pace.observe(8, tokens, 1.01)
    assert pace.mixed_tokens(512) == 128


def test_prompts_go_on_where_even_one_block_takes_too_long() -> None:
    assert set(served(lambda tokens: 1.0 + tokens, 10)) == {16}


def test_a_hiccup_of_decode_steps_and_the_rest_of_a_prompt_change_nothing() -> None:
    pace = Pace()
    assert pace.mixed_tokens(512) == 0  # nobody knows yet what a decode step takes
    pace.observe(8, 16, 9.0)
    for seconds in (1.0, 1.0, 9.0):
        pace.observe(8, 0, seconds)
    pace.observe(8, 3, 1.1)
    pace.observe(0, 300, 9.0)  # nobody waited
    assert pace.mixed_tokens(512) == 16
    pace.observe(8, 16, 1.3)
    assert (pace.mixed_tokens(512), pace.mixed_tokens(20)) == (32, 20)


def test_under_a_backlog_decodes_alone_are_timed_now_and_then() -> None:
    shares = served(lambda tokens: 1.0 + tokens * 0.01, 4 * REFRESH_STEPS)
    idle = [index for index, share in enumerate(shares) if share == 0]
    assert idle == [REFRESH_STEPS, 2 * REFRESH_STEPS + 1, 3 * REFRESH_STEPS + 2]
