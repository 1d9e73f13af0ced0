"""The choice of workers: pure, so every rule is a table."""

from __future__ import annotations

from baton.messages import Load
from router.policy import WorkerView, choose_decode, choose_prefill


def worker(name: str, *, unseen: tuple[int, int] = (0, 0), **held: int) -> WorkerView:
    fields = {
        "waiting": 0, "waiting_tokens": 0, "running": 0, "pages_used": 0, "pages_total": 100, "handoffs": 0,
        "buffer_bytes_used": 0, "buffer_bytes_total": 1, "buffer_bytes_quarantined": 0,
    }  # fmt: skip
    return WorkerView(name, Load(**(fields | held)), *unseen)


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
