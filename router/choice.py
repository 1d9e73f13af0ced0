"""Which connected workers take a request: the pure policy applied to what is connected now."""

from __future__ import annotations

from baton.request import Work
from router import policy
from router.peers import Peer, Pools, Role
from router.recovery import NoWorker

NO_WORKER_RETRY_MS = 1000


class Choice:
    """Picks workers among those in ``pools``. Raises :class:`NoWorker` when no worker of a role is connected.

    exclude: ids of workers that failed this request: not chosen again while there are others.
    """

    def __init__(self, pools: Pools, *, decode_page_tokens: int, disaggregated: bool, local_prefill: bool) -> None:
        self._pools, self._page_tokens = pools, decode_page_tokens
        self._disaggregated, self._local_prefill = disaggregated, local_prefill

    def decode(self, work: Work, exclude: frozenset[str] = frozenset()) -> Peer:
        peers = self._peers("decode", exclude)
        views = [peer.view() for peer in peers]
        return _named(peers, policy.choose_decode(views, len(work.prompt), self._page_tokens), "decode")

    def prefill(self, work: Work, exclude: frozenset[str] = frozenset()) -> Peer:
        peers = self._peers("prefill", exclude)
        return _named(peers, policy.choose_prefill(peer.view() for peer in peers), "prefill")

    def local(self, work: Work, decode: Peer, exclude: frozenset[str] = frozenset()) -> bool:
        """Whether ``decode`` computes the prompt itself."""
        if not self._disaggregated:
            return True
        views = {view.worker_id: view for view in (peer.view() for peer in self._peers("prefill", exclude))}
        best = policy.choose_prefill(views.values())
        return self._local_prefill and policy.prefers_local(decode.view(), views.get(best or ""), len(work.prompt))

    def _peers(self, role: Role, exclude: frozenset[str]) -> list[Peer]:
        peers = self._pools.of(role)
        return [peer for peer in peers if peer.address.worker_id not in exclude] or peers


def _named(peers: list[Peer], worker_id: str | None, role: Role) -> Peer:
    for peer in peers:
        if peer.address.worker_id == worker_id:
            return peer
    raise NoWorker(f"no {role} worker is connected", retry_after_ms=NO_WORKER_RETRY_MS)
