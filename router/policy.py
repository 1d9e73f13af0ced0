"""Which workers take a request. Pure: what is known about the workers goes in, the choice comes out.

Pushed load is up to one heartbeat old, so what this router dispatched since is added to it: without that, a burst
that arrives between two pushes would all go to the same worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from baton.messages import Load


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as the router sees it. ``unseen_*``: dispatched after the worker's last pushed load."""

    worker_id: str
    load: Load
    unseen_requests: int = 0
    unseen_tokens: int = 0

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that would be computed before a new prompt's."""
        return self.load.waiting_tokens + self.unseen_tokens

    @property
    def sequences(self) -> int:
        """Sequences that would share the decode batch with a new one."""
        return self.load.running + self.load.waiting + self.load.handoffs + self.unseen_requests

    def fits(self, tokens: int, page_tokens: int) -> bool:
        """Whether ``tokens`` more tokens of KV would find pages, as far as the router knows."""
        free_pages = self.load.pages_total - self.load.pages_used
        return free_pages * page_tokens >= tokens + self.unseen_tokens


def choose_prefill(workers: Iterable[WorkerView]) -> str | None:
    """The worker with the fewest prompt tokens before us; ties go to the lower id. None when there is no worker."""
    best = min(workers, key=lambda w: (w.queued_tokens, w.load.running + w.unseen_requests, w.worker_id), default=None)
    return best.worker_id if best else None


def choose_decode(workers: Sequence[WorkerView], tokens: int, page_tokens: int) -> str | None:
    """The worker with the smallest batch among those with pages for ``tokens``; without any such, among all.

    ``tokens`` is the prompt's length. A worker that turns out to be full refuses with RESOURCE_EXHAUSTED itself.
    """
    roomy = [worker for worker in workers if worker.fits(tokens, page_tokens)] or workers
    best = min(roomy, key=lambda w: (w.sequences, w.load.pages_used, w.worker_id), default=None)
    return best.worker_id if best else None
