"""The choice of workers: pure, so every rule is a table."""

from __future__ import annotations

from baton.messages import Load
from router.policy import LOCAL_GAIN, MIXED_COST, WorkerView, choose_decode, choose_prefill, prefers_local


def worker(name: str, *, unseen: tuple[int, int] = (0, 0), **held: float) -> WorkerView:
    fields = {
        "waiting": 0, "waiting_tokens": 0, "running": 0, "pages_used": 0, "pages_total": 100, "handoffs": 0,
        "buffer_bytes_used": 0, "buffer_bytes_total": 1, "buffer_bytes_quarantined": 0,
    }  # fmt: skip
    return WorkerView(name, Load(**(fields | held)), *unseen, unseen[1])


def test_no_workers_no_choice() -> None:
    assert choose_prefill([]) is None
    assert choose_decode([], 1, 16) is None


def test_prefill_takes_the_shortest_queue_of_tokens_not_of_requests() -> None:
    many_short = worker("a", waiting=5, waiting_tokens=50)
    one_long = worker("b", waiting=1, waiting_tokens=2000)
    assert choose_prefill([one_long, many_short]) == "a"


def test_prefill_counts_what_was_dispatched_since_the_last_push() -> None:
    assert choose_prefill([worker("a", unseen=(1, 500)), worker("b", waiting_tokens=100)]) == "b"


def test_prefill_ties_spread_by_requests_then_by_id() -> None:
    assert choose_prefill([worker("b"), worker("a")]) == "a"
    assert choose_prefill([worker("a", running=1), worker("b")]) == "b"


def test_decode_takes_the_smallest_batch() -> None:
    assert choose_decode([worker("a", running=4), worker("b", running=2, handoffs=1)], 10, 16) == "b"


def test_decode_avoids_workers_without_pages_while_another_has_some() -> None:
    full, roomy = worker("a", pages_used=99), worker("b", running=9)
    assert choose_decode([full, roomy], 17, 16) == "b"
    assert choose_decode([full, roomy], 16, 16) == "a"
    assert choose_decode([full], 17, 16) == "a"  # it will refuse or make the request wait


def test_decode_leaves_room_for_tokens_it_has_not_heard_of() -> None:
    assert choose_decode([worker("a", pages_used=98, unseen=(1, 30)), worker("b", running=9)], 16, 16) == "b"


def test_an_idle_prefill_worker_gets_the_prompt_however_slow_it_is() -> None:
    assert not prefers_local(worker("d", prompt_token_s=0.001), worker("p", prompt_token_s=0.1), 1000)


def test_a_line_at_the_prefill_worker_that_is_much_longer_sends_the_prompt_to_decode() -> None:
    busy = {"prompt_token_s": 0.003, "waiting_tokens": 1000}
    decode = worker("d", prompt_token_s=0.006)
    limit = LOCAL_GAIN * 0.006 / 0.003 * 500 - 500  # tokens in the line at which both are as good, gain included
    assert not prefers_local(decode, worker("p", **busy | {"waiting_tokens": limit - 1}), 500)
    assert prefers_local(decode, worker("p", **busy | {"waiting_tokens": limit + 1}), 500)


def test_prompts_at_the_decode_worker_count_as_well() -> None:
    line = worker("p", prompt_token_s=0.003, waiting_tokens=4000)
    assert prefers_local(worker("d", prompt_token_s=0.003), line, 500)
    assert not prefers_local(worker("d", prompt_token_s=0.003, waiting_tokens=4000), line, 500)
    assert not prefers_local(worker("d", prompt_token_s=0.003, unseen=(8, 4000)), line, 500)


def test_until_measured_a_prompt_token_beside_decodes_is_taken_for_a_dear_one() -> None:
    line = worker("p", prompt_token_s=0.003, waiting_tokens=1000)
    assert prefers_local(worker("d"), line, 400) == (LOCAL_GAIN * MIXED_COST * 400 < 1400)
    assert prefers_local(worker("d"), line, 600) == (LOCAL_GAIN * MIXED_COST * 600 < 1600)
    assert not prefers_local(worker("d"), worker("p", waiting_tokens=10**6), 1)  # nothing was measured anywhere


def test_without_a_prefill_worker_decode_is_the_only_one() -> None:
    assert prefers_local(worker("d"), None, 100)


def test_pages_promised_to_a_handoff_are_no_prompt_tokens_to_compute() -> None:
    view = WorkerView("d", worker("d").load, 1, 500, 0)
    assert view.queued_tokens == 0
    assert not view.fits(1600 - 499, 16)
