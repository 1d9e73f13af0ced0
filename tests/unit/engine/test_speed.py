"""Seconds per prompt token follow what steps cost lately."""

from __future__ import annotations

import pytest

from engine.speed import HALF_LIFE_TOKENS, PromptSpeed


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
