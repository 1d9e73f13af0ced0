"""What the router knows about a worker and a prompt, and whether the two workers of a request are better one. Pure.

Pushed load is up to one heartbeat old, so what this router dispatched since is added to it: without that, a burst
that arrives between two pushes would all go to the same worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
    handoff_token_s: float = 0.0  # what streams lately waited for the handoff to it, by prompt token; 0: unknown

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


@dataclass(frozen=True, slots=True)
class Prompt:
    """What matters of a request. ``held``: tokens of it that each worker has cached; who is not in it is unknown."""

    tokens: int
    held: Mapping[str, int] = field(default_factory=dict)
    first: int = 0  # the name of its first block (baton.blocks); 0: it has no full one
    session: str = ""
    turn: int = 0  # requests before this one

    def uncached(self, worker_id: str) -> int:
        """Tokens that ``worker_id`` would compute: one at least, for its logits."""
        return max(1, self.tokens - self.held.get(worker_id, 0))


def prefers_local(decode: WorkerView, prefill: WorkerView | None, prompt: Prompt) -> bool:
    """Whether ``decode`` computes ``prompt`` itself, its best ``prefill`` worker being that one.

    Beside its decodes that goes slowly, and stretches their gaps as far as ``gap_ms`` allows. So it must give the first
    token ``LOCAL_GAIN`` times sooner than the line at the prefill worker: by both workers' own measure of a prompt
    token, what each has cached, and what a handoff lately kept streams waiting. While nothing was measured, or no
    prompt waits anywhere and ``decode`` has no more of this one cached, prefill workers do what they are there for.
    """
    if prefill is None:
        return True
    here, there = prompt.uncached(decode.worker_id), prompt.uncached(prefill.worker_id)
    if prefill.queued_tokens == 0 and here >= there:
        return False
    token_s = prefill.load.prompt_token_s
    remote_s = token_s * (prefill.queued_tokens + there) + decode.handoff_token_s * prompt.tokens
    local_s = (decode.load.prompt_token_s or MIXED_COST * token_s) * (decode.queued_tokens + here)
    return token_s > 0.0 and LOCAL_GAIN * local_s < remote_s
