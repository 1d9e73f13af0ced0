"""The prompt tokens of a mixed step follow what steps cost."""

from __future__ import annotations

from engine.pace import Pace


def learned(decode_s: float, token_s: float) -> Pace:
    pace = Pace()
    pace.observe(0, 64, 64 * token_s)
    pace.observe(4, 0, decode_s)
    return pace


def test_before_both_kinds_of_steps_were_seen_the_default_holds() -> None:
    pace = Pace(first=48)
    assert (pace.mixed_tokens(512), pace.mixed_tokens(32)) == (48, 32)
    pace.observe(8, 48, 0.1)  # which part of it was the prompt's is not known
    pace.observe(8, 0, 0.05)
    assert pace.mixed_tokens(512) == 48


def test_prompts_get_most_of_a_decode_steps_time_on_top_of_it() -> None:
    assert learned(0.1, 0.001).mixed_tokens(512) == 80
    assert learned(0.099, 0.001).mixed_tokens(512) == 64  # whole blocks of 16
    assert learned(0.1, 0.001).mixed_tokens(50) == 50
    assert learned(0.001, 0.001).mixed_tokens(512) == 16  # prompts do go on
    assert learned(0.1, 1e-6).mixed_tokens(512) == 512


def test_mixed_steps_teach_what_a_prompt_token_costs() -> None:
    pace = learned(0.1, 0.001)
    for _ in range(20):
        pace.observe(4, 30, 0.1 + 32 * 0.002)  # 30 tokens cost two blocks
    assert pace.mixed_tokens(512) == 32
    for _ in range(20):
        pace.observe(4, 16, 0.09)  # faster than without: prompts cost nothing
    assert pace.mixed_tokens(512) == 512


def test_one_slow_step_changes_nothing() -> None:
    pace = learned(0.1, 0.001)
    for _ in range(3):
        pace.observe(4, 0, 0.1)
        pace.observe(0, 64, 0.064)
    pace.observe(4, 0, 9.0)
    pace.observe(0, 64, 9.0)
    assert pace.mixed_tokens(512) == 80
