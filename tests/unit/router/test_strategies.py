"""The strategies by example; what holds for all inputs is in ``tests/property/router``."""

from __future__ import annotations

from collections import Counter

import pytest

from baton.messages import Load
from router.policy import Prompt, WorkerView
from router.strategies import choose_decode, choose_prefill, predicted_s, rendezvous


def worker(name: str, *, unseen: tuple[int, int] = (0, 0), **held: float) -> WorkerView:
    fields = {
        "waiting": 0, "waiting_tokens": 0, "running": 0, "pages_used": 0, "pages_total": 100, "handoffs": 0,
        "buffer_bytes_used": 0, "buffer_bytes_total": 1, "buffer_bytes_quarantined": 0,
    }  # fmt: skip
    return WorkerView(name, Load(**(fields | held)), *unseen, unseen[1])  # type: ignore[arg-type]


def test_no_workers_no_choice() -> None:
    assert choose_prefill("least_load", [], Prompt(1), factor=1.5) is None
    assert choose_decode("least_load", [], Prompt(1), factor=1.5, page_tokens=16) is None


# ---- least load


def test_least_load_takes_the_shortest_queue_of_tokens_not_of_requests() -> None:
    many_short, one_long = worker("a", waiting=5, waiting_tokens=50), worker("b", waiting=1, waiting_tokens=2000)
    assert choose_prefill("least_load", [one_long, many_short], Prompt(9), factor=1.5) == "a"


def test_what_was_dispatched_since_the_last_push_counts() -> None:
    pool = [worker("a", unseen=(1, 500)), worker("b", waiting_tokens=100)]
    assert choose_prefill("least_load", pool, Prompt(9), factor=1.5) == "b"
    assert choose_prefill("least_ttft", pool, Prompt(9), factor=1.5) == "b"


def test_least_load_spreads_ties_by_requests_then_by_id() -> None:
    assert choose_prefill("least_load", [worker("b"), worker("a")], Prompt(9), factor=1.5) == "a"
    assert choose_prefill("least_load", [worker("a", running=1), worker("b")], Prompt(9), factor=1.5) == "b"


# ---- least predicted TTFT


def test_the_prediction_is_queue_and_uncached_prompt_at_the_workers_own_speed() -> None:
    pool = [worker("a", prompt_token_s=0.002, waiting_tokens=100), worker("b", prompt_token_s=0.004)]
    assert predicted_s(pool, Prompt(500, {"b": 448})) == pytest.approx({"a": 1.2, "b": 0.208})


def test_who_has_measured_nothing_is_taken_for_an_average_worker() -> None:
    pool = [worker("a", prompt_token_s=0.002), worker("b", prompt_token_s=0.004), worker("c")]
    assert predicted_s(pool, Prompt(1000))["c"] == pytest.approx(3.0)
    assert predicted_s([worker("a", waiting_tokens=5), worker("b")], Prompt(10)) == {"a": 15.0, "b": 10.0}


def test_a_fast_worker_with_a_longer_queue_may_be_through_sooner() -> None:
    fast = worker("fast", prompt_token_s=0.001, waiting_tokens=1000)
    slow = worker("slow", prompt_token_s=0.01, waiting_tokens=0)
    assert choose_prefill("least_load", [fast, slow], Prompt(500), factor=1.5) == "slow"
    assert choose_prefill("least_ttft", [fast, slow], Prompt(500), factor=1.5) == "fast"


# ---- prefix affinity


def test_a_cached_prefix_is_worth_waiting_for_up_to_the_factor() -> None:
    held = {"a": 64, "b": 0}
    for queue, factor, chosen in ((1000, 1.5, "b"), (500, 1.5, "a"), (564, 1.5, "a"), (565, 1.5, "b"), (565, 2.0, "a")):
        pool = [worker("a", waiting_tokens=queue), worker("b")]
        assert choose_prefill("prefix_affinity", pool, Prompt(1000, held), factor=factor) == chosen, queue


def test_of_those_that_hold_the_same_the_soonest() -> None:
    pool = [worker("a", waiting_tokens=10), worker("b"), worker("c")]
    assert choose_prefill("prefix_affinity", pool, Prompt(500, {"a": 448, "b": 448, "c": 64}), factor=1.5) == "b"


def test_a_hot_prefix_spreads_when_its_worker_is_behind_and_then_both_take_it() -> None:
    held = {"a": 960, "b": 0}
    pool = [worker("a", waiting_tokens=4000), worker("b")]
    assert choose_prefill("prefix_affinity", pool, Prompt(1000, held), factor=1.5) == "b"
    held = {"a": 960, "b": 960}  # as the events then say
    pool = [worker("a", waiting_tokens=4000), worker("b", waiting_tokens=40)]
    assert choose_prefill("prefix_affinity", pool, Prompt(1000, held), factor=1.5) == "b"


def test_routers_that_know_nothing_agree_on_a_worker_for_what_begins_alike() -> None:
    pool = [worker(name) for name in "abcd"]
    for first in range(1, 50):
        chosen = choose_prefill("prefix_affinity", pool, Prompt(500, {}, first), factor=1.5)
        assert chosen == rendezvous(pool, str(first))
        assert chosen == choose_prefill("prefix_affinity", pool[::-1], Prompt(700, {}, first), factor=1.5)


def test_hashing_is_only_for_workers_that_are_unknown() -> None:
    pool = [worker("a"), worker("b", waiting_tokens=1)]
    hashed = {first: rendezvous(pool, str(first)) for first in range(1, 20)}
    assert set(hashed.values()) == {"a", "b"}
    for first, name in hashed.items():
        everybody = Prompt(500, {"a": 0, "b": 0}, first)
        assert choose_prefill("prefix_affinity", pool, everybody, factor=1.5) == "a"
        only_a = Prompt(500, {"a": 0}, first)
        assert choose_prefill("prefix_affinity", pool, only_a, factor=1.5) == name  # unknown b, or the idle a
        known_match = Prompt(500, {"a": 64}, first)
        assert choose_prefill("prefix_affinity", pool, known_match, factor=1.5) == "a"


def test_without_a_full_block_nothing_is_hashed() -> None:
    pool = [worker("a", waiting_tokens=1), worker("b")]
    assert choose_prefill("prefix_affinity", pool, Prompt(50), factor=100.0) == "b"


# ---- sessions and baselines


def test_a_session_stays_with_its_worker_whatever_the_load() -> None:
    idle = [worker(name) for name in "abc"]
    home = choose_prefill("session", idle, Prompt(9, session="s"), factor=1.5)
    busy = [worker(name, waiting_tokens=10**6 if name == home else 0) for name in "cab"]
    assert choose_prefill("session", busy, Prompt(9, session="s"), factor=1.5) == home
    assert choose_decode("session", busy, Prompt(9, session="s"), factor=1.5, page_tokens=16) == home


def test_without_a_session_the_least_ttft() -> None:
    pool = [worker("a", waiting_tokens=9), worker("b")]
    assert choose_prefill("session", pool, Prompt(9), factor=1.5) == "b"


def test_round_robin_takes_turns_and_random_does_not() -> None:
    pool = [worker(name) for name in "cab"]
    turns = [choose_prefill("round_robin", pool, Prompt(9, turn=turn), factor=1.5) for turn in range(6)]
    assert turns == ["a", "b", "c"] * 2
    draws = [choose_prefill("random", pool, Prompt(9, turn=turn), factor=1.5) for turn in range(3000)]
    assert draws == [choose_prefill("random", pool, Prompt(9, turn=turn), factor=1.5) for turn in range(3000)]
    assert all(900 < count < 1100 for count in Counter(draws).values())
    assert draws[:3000:3] != ["a"] * 1000


# ---- decode


def test_decode_takes_the_smallest_batch() -> None:
    pool = [worker("a", running=4), worker("b", running=2, handoffs=1)]
    for strategy in ("least_load", "least_ttft", "session", "prefix_affinity"):
        assert choose_decode(strategy, pool, Prompt(10), factor=1.0, page_tokens=16) == "b"


def test_decode_avoids_workers_without_pages_while_another_has_some() -> None:
    full, roomy = worker("a", pages_used=99), worker("b", running=9)
    for strategy in ("least_load", "prefix_affinity", "round_robin"):
        assert choose_decode(strategy, [full, roomy], Prompt(17), factor=1.5, page_tokens=16) == "b"
        assert choose_decode(strategy, [full], Prompt(17), factor=1.5, page_tokens=16) == "a"  # it will refuse
    assert choose_decode("least_load", [full, roomy], Prompt(16), factor=1.5, page_tokens=16) == "a"


def test_decode_leaves_room_for_tokens_it_has_not_heard_of() -> None:
    pool = [worker("a", pages_used=98, unseen=(1, 30)), worker("b", running=9)]
    assert choose_decode("least_load", pool, Prompt(16), factor=1.5, page_tokens=16) == "b"


def test_a_conversation_returns_to_its_decode_worker_while_batches_are_balanced() -> None:
    prompt = Prompt(100, {"a": 64, "b": 0})
    for running, chosen in ((1, "a"), (4, "a"), (5, "b")):
        pool = [worker("a", running=running), worker("b", running=2)]
        assert choose_decode("prefix_affinity", pool, prompt, factor=1.5, page_tokens=16) == chosen
