"""Which worker takes a request: six named strategies, each a pure function of what is known about workers and prompt.

prefix_affinity   the worker that holds most of the prompt, while that costs little waiting (default)
least_ttft        the worker that is through with the prompt soonest, by pushed queues and measured speeds
session           the worker of the request's session, by rendezvous hashing
least_load        the fewest prompt tokens before ours   )
round_robin       each in turn                           ) baselines, blind to caches
random            a seeded draw                          )
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import assert_never

from baton.config_routing import Strategy
from router.policy import Prompt, WorkerView

SEED = b"baton"  # of the random strategy


def choose_prefill(strategy: Strategy, workers: Sequence[WorkerView], prompt: Prompt, *, factor: float) -> str | None:
    """The id of the worker that is to compute ``prompt``; None when there are no workers.

    factor: how many times the least predicted TTFT ``prefix_affinity`` accepts for a cached prefix.
    """
    if not workers:
        return None
    match strategy:
        case "prefix_affinity":
            return prefix_affinity(workers, prompt, factor)
        case "least_ttft":
            return least_ttft(workers, prompt)
        case "session":
            return rendezvous(workers, prompt.session) if prompt.session else least_ttft(workers, prompt)
        case "least_load":
            return min(
                workers, key=lambda w: (w.queued_tokens, w.load.running + w.unseen_requests, w.worker_id)
            ).worker_id
        case "round_robin" | "random":
            return in_turn(strategy, workers, prompt.turn)
        case never:
            assert_never(never)


def choose_decode(
    strategy: Strategy, workers: Sequence[WorkerView], prompt: Prompt, *, factor: float, page_tokens: int
) -> str | None:
    """The id of the worker that is to decode ``prompt``; None when there are no workers.

    Only those with pages for it are asked, while there are any: one that turns out to be full refuses with
    RESOURCE_EXHAUSTED itself. Batches decide, because every stream in a batch pays for its size; the baselines, and a
    session where sessions do, do not look at them.
    """
    roomy = [worker for worker in workers if worker.fits(prompt.tokens, page_tokens)] or list(workers)
    if not roomy:
        return None
    match strategy:
        case "session" if prompt.session:
            return rendezvous(roomy, prompt.session)
        case "prefix_affinity":
            return _match_decode(roomy, prompt, factor)
        case "round_robin" | "random":
            return in_turn(strategy, roomy, prompt.turn)
        case "session" | "least_ttft" | "least_load":
            return min(roomy, key=_batch).worker_id
        case never:
            assert_never(never)


def _batch(worker: WorkerView) -> tuple[int, int, str]:
    return worker.sequences, worker.load.pages_used, worker.worker_id


def _match_decode(workers: Sequence[WorkerView], prompt: Prompt, factor: float) -> str:
    """Who holds most among the workers whose batch is at most ``factor`` times the smallest, one sequence aside.

    A decode worker that has the conversation so far can compute what is new (:func:`router.policy.prefers_local`).
    """
    limit = factor * min(worker.sequences for worker in workers) + 1
    balanced = [worker for worker in workers if worker.sequences <= limit]
    return min(balanced, key=lambda w: (-prompt.held.get(w.worker_id, 0), *_batch(w))).worker_id


def predicted_s(workers: Sequence[WorkerView], prompt: Prompt) -> dict[str, float]:
    """Predicted seconds to the first token at each worker: its queue, then what it has not cached of the prompt.

    Who has measured no speed yet is taken for an average one. While nobody has, seconds are tokens: the order is right.
    The handoff is no part of it: it costs the same from every prefill worker, and the first token does not wait for it.
    """
    measured = [worker.load.prompt_token_s for worker in workers if worker.load.prompt_token_s > 0.0]
    usual_s = sum(measured) / len(measured) if measured else 1.0
    return {
        worker.worker_id: (worker.load.prompt_token_s or usual_s)
        * (worker.queued_tokens + prompt.uncached(worker.worker_id))
        for worker in workers
    }


def least_ttft(workers: Sequence[WorkerView], prompt: Prompt) -> str:
    """The least predicted TTFT; ties go to the fewest sequences, then to the lower id."""
    return _soonest(workers, predicted_s(workers, prompt))


def _soonest(workers: Sequence[WorkerView], predicted: Mapping[str, float]) -> str:
    return min(workers, key=lambda w: (predicted[w.worker_id], w.sequences, w.worker_id)).worker_id


def prefix_affinity(workers: Sequence[WorkerView], prompt: Prompt, factor: float) -> str:
    """The worker that holds most of the prompt, unless its predicted TTFT exceeds ``factor`` times the least.

    Then the prompt goes where that is least, which thereby comes to hold the prefix as well: hot prefixes spread
    instead of drowning their worker, as in Mooncake's Conductor (arXiv 2407.00079), and the others stay where they are,
    which leaves room in every cache (ADR 19).
    """
    predicted = predicted_s(workers, prompt)
    least = _soonest(workers, predicted)
    match = _match(workers, prompt, predicted)
    return match if match is not None and predicted[match] <= factor * predicted[least] else least


def _match(workers: Sequence[WorkerView], prompt: Prompt, predicted: Mapping[str, float]) -> str | None:
    """Who holds most, and of those who hold the same, the soonest.

    If nobody is known to hold any of it, but somebody is unknown: whom rendezvous hashing of the first block names, if
    that one is unknown. Routers that know nothing agree on it, so that what begins alike still meets.
    """
    holders = [worker.worker_id for worker in workers if prompt.held.get(worker.worker_id, 0) > 0]
    if holders:
        return min(holders, key=lambda name: (-prompt.held[name], predicted[name], name))
    if not prompt.first or all(worker.worker_id in prompt.held for worker in workers):
        return None
    name = rendezvous(workers, str(prompt.first))
    return name if name not in prompt.held else None


def rendezvous(workers: Sequence[WorkerView], key: str) -> str:
    """Highest random weight hashing (Thaler and Ravishankar 1998): who comes or goes moves only its own keys."""

    def weight(worker: WorkerView) -> bytes:
        return hashlib.blake2b(f"{worker.worker_id}\0{key}".encode(), digest_size=8).digest()

    return max(workers, key=weight).worker_id


def in_turn(strategy: Strategy, workers: Sequence[WorkerView], turn: int) -> str:
    """The worker of this turn, or at random one drawn for it."""
    drawn = hashlib.blake2b(turn.to_bytes(8, "little"), key=SEED, digest_size=8).digest()
    number = turn if strategy == "round_robin" else int.from_bytes(drawn, "little")
    return sorted(worker.worker_id for worker in workers)[number % len(workers)]
