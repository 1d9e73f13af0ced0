"""The router in the simulation: the real strategies and the real prefix index, on views as old as the real ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from baton.config_routing import BLIND, Strategy
from baton.messages import Load
from placement.events import Timeline
from placement.replica import Replica
from router import strategies
from router.policy import Prompt, WorkerView
from router.prefix_index import PrefixIndex

Role: TypeAlias = Literal["prefill", "decode"]

LOAD_AGE_S = 0.05  # baton.plane.LOAD_CHANGED_S: how old the load that a router sees may be


@dataclass(slots=True)
class _Seen:
    """A worker's load as the router has it, and what was dispatched since."""

    at_s: float
    load: Load
    requests: int = 0
    tokens: int = 0
    prompts: int = 0  # of these, tokens to be computed

    def view(self, name: str) -> WorkerView:
        return WorkerView(name, self.load, self.requests, self.tokens, self.prompts)


class RouterView:
    """Chooses among the workers of each role. Their pages are the blocks of the index, one index a role."""

    def __init__(self, timeline: Timeline, strategy: Strategy, factor: float) -> None:
        self._timeline, self._strategy, self._factor = timeline, strategy, factor
        self._seen: dict[str, _Seen] = {}
        self._indexes: dict[Role, PrefixIndex] = {}
        self._turns: Counter[Role] = Counter()

    def choose(
        self, role: Role, workers: Sequence[Replica], tokens: int, keys: tuple[int, ...], lines: Counter[str]
    ) -> Replica | None:
        """Who takes a prompt of ``tokens`` whose pages ``keys`` name; ``lines``: requests in front of each worker."""
        if not workers:
            return None
        views = [self._view(worker, role, lines[worker.name]) for worker in workers]
        prompt = self._prompt(role, workers, tokens, keys)
        if role == "prefill":
            name = strategies.choose_prefill(self._strategy, views, prompt, factor=self._factor)
        else:
            page_tokens = workers[0].limits.page_tokens
            name = strategies.choose_decode(self._strategy, views, prompt, factor=self._factor, page_tokens=page_tokens)
        chosen = next(worker for worker in workers if worker.name == name)
        self._sent(role, chosen, prompt, keys)
        return chosen

    def forget(self, worker: Replica) -> None:
        """It is dead, and nobody holds what it held."""
        for index in self._indexes.values():
            index.forget(worker.name)

    def _view(self, worker: Replica, role: Role, line: int) -> WorkerView:
        seen, now_s = self._seen.get(worker.name), self._timeline.now_s
        if seen is None or now_s - seen.at_s >= LOAD_AGE_S:
            load = worker.load(waiting_tokens=role == "prefill", line=line)
            self._hear(worker, role, first=seen is None)
            seen = self._seen[worker.name] = _Seen(now_s, load)
        return seen.view(worker.name)

    def _hear(self, worker: Replica, role: Role, *, first: bool) -> None:
        """The cache events that come with the load."""
        events = worker.blocks.snapshot() if first else worker.blocks.take()
        if events is not None and self._strategy not in BLIND:
            self._index(role, worker).apply(worker.name, events)

    def _prompt(self, role: Role, workers: Sequence[Replica], tokens: int, keys: tuple[int, ...]) -> Prompt:
        self._turns[role] += 1
        held = self._index(role, workers[0]).match(keys, self._timeline.now_s) if keys else {}
        return Prompt(tokens, held, keys[0] if keys else 0, turn=self._turns[role])

    def _sent(self, role: Role, worker: Replica, prompt: Prompt, keys: tuple[int, ...]) -> None:
        seen = self._seen[worker.name]
        seen.requests += 1
        seen.tokens += prompt.tokens
        seen.prompts += prompt.uncached(worker.name)
        if keys:
            self._index(role, worker).expect(worker.name, keys, self._timeline.now_s)

    def _index(self, role: Role, worker: Replica) -> PrefixIndex:
        return self._indexes.setdefault(role, PrefixIndex(block_tokens=worker.limits.page_tokens))
