"""Seconds per prompt token, and of a decode step, follow what steps cost lately."""

from __future__ import annotations

import pytest

from engine.speed import HALF_LIFE_TOKENS, PromptSpeed, StepSpeed


def test_nothing_is_known_before_the_first_prompt() -> None:
    speed = PromptSpeed()
    speed.observe(0, 9.0)
    assert speed.token_s == 0.0


def test_it_is_time_over_tokens_not_a_mean_of_rates() -> None:
    speed = PromptSpeed()
    speed.observe(100, 1.0)
    speed.observe(1, 0.5)  # the rest of a prompt pays the fixed part of a step for one token
    assert speed.token_s == pytest.approx(1.5 / 101, rel=0.01)


def test_after_a_half_life_the_past_counts_half() -> None:
    speed = PromptSpeed()
    speed.observe(HALF_LIFE_TOKENS, 1.0)
    speed.observe(HALF_LIFE_TOKENS, 2.0)
    assert speed.token_s == pytest.approx((0.5 * 1.0 + 2.0) / (1.5 * HALF_LIFE_TOKENS))


def test_steps_without_prompts_change_nothing() -> None:
    speed = PromptSpeed()
    speed.observe(64, 1.0)
    before = speed.token_s
    speed.observe(0, 5.0)
    assert speed.token_s == before


def steps(*observed: tuple[int, float]) -> StepSpeed:
    speed = StepSpeed()
    for sequences, step_s in observed:
        speed.observe(sequences, step_s)
    return speed


def test_nothing_is_known_before_the_first_decode() -> None:
    speed = steps((0, 9.0))
    assert (speed.step_s, speed.sequence_s) == (0.0, 0.0)


def test_batches_of_one_size_give_a_flat_line() -> None:
    speed = steps(*[(8, 0.1)] * 50)
    assert speed.sequence_s == 0.0
    assert speed.step_s == pytest.approx(0.1)


def test_different_batches_give_the_slope() -> None:
    speed = steps(*[(size, 0.02 + 0.01 * size) for size in (1, 16)] * 50)
    assert speed.sequence_s == pytest.approx(0.01, rel=0.02)
    assert speed.step_s == pytest.approx(0.02, rel=0.1)


def test_the_line_is_never_steeper_than_proportional_nor_falls() -> None:
    steep = steps(*[(1, 0.001), (2, 1.0)] * 50)
    assert steep.step_s == 0.0
    assert steep.sequence_s == pytest.approx(1.001 / 3, rel=0.02)
    falling = steps(*[(1, 1.0), (9, 0.1)] * 50)
    assert falling.sequence_s == 0.0
    assert falling.step_s == pytest.approx(0.55, rel=0.05)


def test_the_past_fades() -> None:
    speed = steps(*[(4, 1.0)] * 500, *[(4, 0.1)] * 1000)
    assert speed.step_s == pytest.approx(0.1, rel=0.1)
