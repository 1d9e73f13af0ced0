"""The router in the simulation: the real strategies and the real prefix index, on views as old as the real ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from baton.config_routing import BLIND, Strategy
from baton.messages import Load
from engine.speed import PromptSpeed
from placement.events import Timeline
from placement.replica import Replica
from router import policy, strategies
from router.policy import Prompt, WorkerView
from router.prefix_index import PrefixIndex

Role: TypeAlias = Literal["prefill", "decode"]
Lines: TypeAlias = Mapping[str, Sized]
"""Who waits for pages, by worker."""

LOAD_AGE_S = 0.05  # baton.plane.LOAD_CHANGED_S: how old the load that a router sees may be


@dataclass(slots=True)
class _Seen:
    """A worker's load as the router has it, and what was dispatched since."""

    at_s: float
    load: Load
    requests: int = 0
    tokens: int = 0
    prompts: int = 0  # of these, tokens to be computed
    handoffs: PromptSpeed = field(default_factory=PromptSpeed)  # what streams waited for handoffs to it
    kept: WorkerView | None = None  # until one of these changes

    def view(self, name: str) -> WorkerView:
        if self.kept is None:
            self.kept = WorkerView(name, self.load, self.requests, self.tokens, self.prompts, self.handoffs.token_s)
        return self.kept


@dataclass(frozen=True, slots=True)
class _Views:
    """Of ``workers``, as long as nothing is sent to any of them and the oldest of their loads is young enough."""

    workers: Sequence[Replica]
    views: tuple[WorkerView, ...]
    oldest_s: float


class RouterView:
    """Chooses among the workers of each role, as ``router.choice`` does. Their pages are the blocks of the index, one
    index a role."""

    def __init__(self, timeline: Timeline, strategy: Strategy, factor: float) -> None:
        self._timeline, self._strategy, self._factor = timeline, strategy, factor
        self._seen: dict[str, _Seen] = {}
        self._views: dict[Role, _Views] = {}
        self._indexes: dict[Role, PrefixIndex] = {}
        self._turns: Counter[Role] = Counter()

    def decode(self, workers: Sequence[Replica], tokens: int, keys: tuple[int, ...], lines: Lines) -> Replica | None:
        """Who decodes a prompt of ``tokens`` whose pages ``keys`` name."""
        if not workers:
            return None
        self._turns["decode"] += 1
        prompt = self._prompt("decode", workers, tokens, keys)
        page_tokens = workers[0].limits.page_tokens
        views = self.views("decode", workers, lines)
        return _named(
            workers,
            strategies.choose_decode(self._strategy, views, prompt, factor=self._factor, page_tokens=page_tokens),
        )

    def prefill(self, workers: Sequence[Replica], tokens: int, keys: tuple[int, ...]) -> Replica | None:
        """Who computes it."""
        self._turns["prefill"] += 1
        return self._best_prefill(workers, self._prompt("prefill", workers, tokens, keys)) if workers else None

    def prefers_local(
        self, decode: Replica, prefills: Sequence[Replica], tokens: int, keys: dict[Role, tuple[int, ...]], lines: Lines
    ) -> bool:
        """Whether ``decode`` computes the prompt itself; ``keys``: by role, whose pages may differ in size."""
        there = self._prompt("prefill", prefills, tokens, keys["prefill"]) if prefills else Prompt(tokens)
        best = self._best_prefill(prefills, there)
        here = self._prompt("decode", [decode], tokens, keys["decode"]) if keys["decode"] else Prompt(tokens)
        prompt = Prompt(tokens, {**there.held, **here.held})
        remote = self._view(best, "prefill", lines) if best is not None else None
        return policy.prefers_local(self._view(decode, "decode", lines), remote, prompt)

    def sent(self, role: Role, worker: Replica, tokens: int, keys: tuple[int, ...], *, computes: bool) -> None:
        """``worker`` was given the prompt, to compute or only to decode."""
        seen = self._changed(role, worker)
        seen.requests += 1
        seen.tokens += tokens
        if computes:
            seen.prompts += self.uncached(role, [worker], tokens, keys)
            if keys:
                self._index(role, worker).expect(worker.name, keys, self._timeline.now_s)

    def uncached(self, role: Role, workers: Sequence[Replica], tokens: int, keys: tuple[int, ...]) -> int:
        """Tokens that the worker that knows most of the prompt would have to compute."""
        if not keys or not workers:
            return tokens
        prompt = self._prompt(role, workers, tokens, keys)
        return min(prompt.uncached(worker.name) for worker in workers)

    def handed_over(self, decode: Replica, tokens: int, exposed_s: float) -> None:
        """A stream waited so long for its handoff to ``decode``."""
        self._changed("decode", decode).handoffs.observe(tokens, exposed_s)

    def views(self, role: Role, workers: Sequence[Replica], lines: Lines) -> tuple[WorkerView, ...]:
        """The same tuple as before if nothing has changed. ``workers`` must be another list when it holds others."""
        known, now_s = self._views.get(role), self._timeline.now_s
        if known is None or known.workers is not workers or now_s - known.oldest_s >= LOAD_AGE_S:
            views, oldest_s, knows = [], now_s, self._seen
            for worker in workers:
                seen = knows.get(worker.name)
                if seen is None or now_s - seen.at_s >= LOAD_AGE_S:
                    seen = self._told(worker, role, lines)
                views.append(seen.kept or seen.view(worker.name))
                oldest_s = min(oldest_s, seen.at_s)
            known = self._views[role] = _Views(workers, tuple(views), oldest_s)
        return known.views

    def forget(self, worker: Replica) -> None:
        """It is dead, and nobody holds what it held."""
        for index in self._indexes.values():
            index.forget(worker.name)

    def _best_prefill(self, workers: Sequence[Replica], prompt: Prompt) -> Replica | None:
        views = self.views("prefill", workers, {})
        return _named(workers, strategies.choose_prefill(self._strategy, views, prompt, factor=self._factor))

    def _view(self, worker: Replica, role: Role, lines: Lines) -> WorkerView:
        seen = self._seen.get(worker.name)
        if seen is None or self._timeline.now_s - seen.at_s >= LOAD_AGE_S:
            seen = self._told(worker, role, lines)
        return seen.view(worker.name)

    def _told(self, worker: Replica, role: Role, lines: Lines) -> _Seen:
        """The worker pushes its load."""
        before = self._seen.get(worker.name)
        load = worker.load(line=len(lines.get(worker.name, ())))
        self._hear(worker, role, first=before is None)
        handoffs = before.handoffs if before else PromptSpeed()
        seen = self._seen[worker.name] = _Seen(self._timeline.now_s, load, handoffs=handoffs)
        self._views.pop(role, None)
        return seen

    def _changed(self, role: Role, worker: Replica) -> _Seen:
        seen = self._seen[worker.name]
        seen.kept = None
        self._views.pop(role, None)
        return seen

    def _hear(self, worker: Replica, role: Role, *, first: bool) -> None:
        """The cache events that come with the load."""
        events = worker.blocks.snapshot() if first else worker.blocks.take()
        if events is not None and self._strategy not in BLIND:
            self._index(role, worker).apply(worker.name, events)

    def _prompt(self, role: Role, workers: Sequence[Replica], tokens: int, keys: tuple[int, ...]) -> Prompt:
        held = self._index(role, workers[0]).match(keys, self._timeline.now_s) if keys else {}
        return Prompt(tokens, held, keys[0] if keys else 0, turn=self._turns[role])

    def _index(self, role: Role, worker: Replica) -> PrefixIndex:
        return self._indexes.setdefault(role, PrefixIndex(block_tokens=worker.limits.page_tokens))


def _named(workers: Sequence[Replica], name: str | None) -> Replica | None:
    return next((worker for worker in workers if worker.name == name), None)
