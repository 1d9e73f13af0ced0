"""Which connected workers take a request: the pure strategies applied to what is connected now."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict

from baton.blocks import block_names
from baton.config_routing import RoutingConfig
from baton.request import Work
from router import policy, strategies
from router.peers import Peer, Pools, Role
from router.recovery import NoWorker

NO_WORKER_RETRY_MS = 1000
REMEMBERED_PROMPTS = 1024  # whose blocks are named already: a prompt is asked about five times in a row


class Choice:
    """Picks workers among those in ``pools``. Raises :class:`NoWorker` when no worker of a role is connected.

    exclude: ids of workers that failed this request: not chosen again while there are others.
    """

    def __init__(
        self,
        pools: Pools,
        *,
        decode_page_tokens: int,
        disaggregated: bool,
        local_prefill: bool,
        routing: RoutingConfig | None = None,
    ) -> None:
        self._pools, self._page_tokens = pools, decode_page_tokens
        self._disaggregated, self._local_prefill = disaggregated, local_prefill
        self._routing = routing or RoutingConfig()
        self._turns: Counter[Role] = Counter()
        self._names: OrderedDict[tuple[int, int], tuple[int, ...]] = OrderedDict()

    def decode(self, work: Work, exclude: frozenset[str] = frozenset()) -> Peer:
        peers = self._peers("decode", exclude)
        self._turns["decode"] += 1
        name = strategies.choose_decode(
            self._routing.strategy,
            [peer.view() for peer in peers],
            self._prompt(work, peers, self._turns["decode"]),
            factor=self._routing.affinity_factor,
            page_tokens=self._page_tokens,
        )
        return _named(self._pools, peers, name, "decode")

    def prefill(self, work: Work, exclude: frozenset[str] = frozenset()) -> Peer:
        peers = self._peers("prefill", exclude)
        self._turns["prefill"] += 1
        return _named(self._pools, peers, self._best_prefill(work, peers), "prefill")

    def local(self, work: Work, decode: Peer, exclude: frozenset[str] = frozenset()) -> bool:
        """Whether ``decode`` computes the prompt itself."""
        return not self._disaggregated or (self._local_prefill and self._prefers_local(work, decode, exclude))

    def uncached(self, work: Work) -> int:
        """Tokens of ``work`` that the worker that knows most of it would have to compute."""
        peers = self._peers("prefill" if self._disaggregated else "decode", frozenset())
        prompt = self._prompt(work, peers)
        return min((prompt.uncached(peer.address.worker_id) for peer in peers), default=prompt.tokens)

    def assigned(self, work: Work, peer: Peer) -> int:
        """``peer`` is to compute ``work`` now: how many tokens. Whoever asks next is told that it has the prompt."""
        tokens = self._prompt(work, [peer]).uncached(peer.address.worker_id)
        self._pools.index.expect(peer.address.generation, self._block_names(work), time.monotonic())
        return tokens

    def _prefers_local(self, work: Work, decode: Peer, exclude: frozenset[str]) -> bool:
        peers = self._peers("prefill", exclude)
        views = {view.worker_id: view for view in (peer.view() for peer in peers)}
        best = views.get(self._best_prefill(work, peers) or "")
        return policy.prefers_local(decode.view(), best, self._prompt(work, [*peers, decode]))

    def _best_prefill(self, work: Work, peers: list[Peer]) -> str | None:
        return strategies.choose_prefill(
            self._routing.strategy,
            [peer.view() for peer in peers],
            self._prompt(work, peers, self._turns["prefill"]),
            factor=self._routing.affinity_factor,
        )

    def _prompt(self, work: Work, peers: list[Peer], turn: int = 0) -> policy.Prompt:
        names = self._block_names(work)
        held = self._pools.index.match(names, time.monotonic())
        known = {p.address.worker_id: held[p.address.generation] for p in peers if p.address.generation in held}
        return policy.Prompt(len(work.known), known, names[0] if names else 0, work.session, turn)

    def _block_names(self, work: Work) -> tuple[int, ...]:
        known = work.known
        key = (hash(known), len(known))  # who makes two prompts collide gets a wrong hint
        names = self._names.get(key)
        if names is None:
            names = self._names[key] = block_names(known)
            if len(self._names) > REMEMBERED_PROMPTS:
                self._names.popitem(last=False)
        return names

    def _peers(self, role: Role, exclude: frozenset[str]) -> list[Peer]:
        peers = self._pools.of(role)
        return [peer for peer in peers if peer.address.worker_id not in exclude] or peers


def _named(pools: Pools, peers: list[Peer], worker_id: str | None, role: Role) -> Peer:
    for peer in peers:
        if peer.address.worker_id == worker_id:
            return peer
    raise NoWorker(f"no {role} worker is connected", lost_s=pools.lost_s(role), retry_after_ms=NO_WORKER_RETRY_MS)
