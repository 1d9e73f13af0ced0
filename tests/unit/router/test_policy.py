"""Whether a decode worker computes a prompt itself: pure, so every rule is a table."""

from __future__ import annotations

import pytest

from baton.messages import Load
from router.policy import LOCAL_GAIN, MIXED_COST, Prompt, WorkerView, prefers_local


def worker(name: str, *, unseen: tuple[int, int] = (0, 0), handoff_token_s: float = 0.0, **held: float) -> WorkerView:
    fields = {
        "waiting": 0, "waiting_tokens": 0, "running": 0, "pages_used": 0, "pages_total": 100, "handoffs": 0,
        "buffer_bytes_used": 0, "buffer_bytes_total": 1, "buffer_bytes_quarantined": 0,
    }  # fmt: skip
    load = Load(**(fields | held))  # type: ignore[arg-type]
    return WorkerView(name, load, *unseen, unseen[1], handoff_token_s)


def test_an_idle_prefill_worker_gets_the_prompt_however_slow_it_is() -> None:
    assert not prefers_local(worker("d", prompt_token_s=0.001), worker("p", prompt_token_s=0.1), Prompt(1000))


def test_a_line_at_the_prefill_worker_that_is_much_longer_sends_the_prompt_to_decode() -> None:
    busy = {"prompt_token_s": 0.003, "waiting_tokens": 1000}
    decode = worker("d", prompt_token_s=0.006)
    limit = LOCAL_GAIN * 0.006 / 0.003 * 500 - 500  # tokens in the line at which both are as good, gain included
    assert not prefers_local(decode, worker("p", **busy | {"waiting_tokens": limit - 1}), Prompt(500))
    assert prefers_local(decode, worker("p", **busy | {"waiting_tokens": limit + 1}), Prompt(500))


def test_prompts_at_the_decode_worker_count_as_well() -> None:
    line = worker("p", prompt_token_s=0.003, waiting_tokens=4000)
    assert prefers_local(worker("d", prompt_token_s=0.003), line, Prompt(500))
    assert not prefers_local(worker("d", prompt_token_s=0.003, waiting_tokens=4000), line, Prompt(500))
    assert not prefers_local(worker("d", prompt_token_s=0.003, unseen=(8, 4000)), line, Prompt(500))


def test_until_measured_a_prompt_token_beside_decodes_is_taken_for_a_dear_one() -> None:
    line = worker("p", prompt_token_s=0.003, waiting_tokens=1000)
    assert prefers_local(worker("d"), line, Prompt(400)) == (LOCAL_GAIN * MIXED_COST * 400 < 1400)
    assert prefers_local(worker("d"), line, Prompt(600)) == (LOCAL_GAIN * MIXED_COST * 600 < 1600)
    assert not prefers_local(worker("d"), worker("p", waiting_tokens=10**6), Prompt(1))  # nothing was measured anywhere


def test_without_a_prefill_worker_decode_is_the_only_one() -> None:
    assert prefers_local(worker("d"), None, Prompt(100))


@pytest.mark.parametrize(
    ("here", "there", "local"),
    [
        (960, 0, True),  # 40 tokens beside decodes are sooner there than 1000 alone
        (960, 960, False),  # the idle prefill worker has as much
        (0, 960, False),
        (512, 448, False),  # more, but 488 beside decodes are no faster than 552 alone
    ],
)
def test_a_decode_worker_that_has_the_conversation_so_far_computes_what_is_new(
    here: int, there: int, local: bool
) -> None:
    held = {"d": here, "p": there}
    prefill = worker("p", prompt_token_s=0.003)
    assert prefers_local(worker("d"), prefill, Prompt(1000, held)) is local


def test_what_handoffs_lately_cost_is_part_of_the_way_over_the_prefill_worker() -> None:
    line = worker("p", prompt_token_s=0.003, waiting_tokens=500)
    assert not prefers_local(worker("d", prompt_token_s=0.003), line, Prompt(1000))
    assert prefers_local(worker("d", prompt_token_s=0.003, handoff_token_s=0.001), line, Prompt(1000))


def test_pages_promised_to_a_handoff_are_no_prompt_tokens_to_compute() -> None:
    view = WorkerView("d", worker("d").load, 1, 500, 0)
    assert view.queued_tokens == 0
    assert not view.fits(1600 - 499, 16)


def test_one_token_at_least_is_computed_for_its_logits() -> None:
    assert Prompt(64, {"a": 64}).uncached("a") == 1
    assert Prompt(64, {"a": 64}).uncached("b") == 64
