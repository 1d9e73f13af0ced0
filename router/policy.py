"""Which workers take a request. Pure: what is known about the workers goes in, the choice comes out.

Pushed load is up to one heartbeat old, so what this router dispatched since is added to it: without that, a burst
that arrives between two pushes would all go to the same worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from baton.messages import Load

LOCAL_GAIN = 1.5  # how many times sooner the first token must come for the decode worker to compute the prompt itself
MIXED_COST = 2.0  # what a prompt token costs beside decodes, in that of a prefill worker, until it was measured


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as the router sees it. ``unseen_*``: dispatched after the worker's last pushed load."""

    worker_id: str
    load: Load
    unseen_requests: int = 0
    unseen_tokens: int = 0
    unseen_prompts: int = 0  # of these, tokens to be computed there

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that would be computed before a new prompt's."""
        return self.load.waiting_tokens + self.unseen_prompts

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


def prefers_local(decode: WorkerView, prefill: WorkerView | None, tokens: int) -> bool:
    """Whether ``decode`` computes a prompt of ``tokens`` tokens itself, its best ``prefill`` worker being that one.

    Beside its decodes that goes slowly, and stretches their gaps as far as ``gap_ms`` allows. So it must give the first
    token ``LOCAL_GAIN`` times sooner than the line at the prefill worker: by both workers' own measure of a prompt
    token. While nothing was measured, or no prompt waits anywhere, prefill workers do what they are there for.
    """
    if prefill is None:
        return True
    remote_s = prefill.load.prompt_token_s * (prefill.queued_tokens + tokens)
    local_s = (decode.load.prompt_token_s or MIXED_COST * prefill.load.prompt_token_s) * (decode.queued_tokens + tokens)
    return prefill.queued_tokens > 0 and LOCAL_GAIN * local_s < remote_s
