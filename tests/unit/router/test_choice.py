"""The choice among connected workers: real peers of a real plane, strategies by configuration."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from baton.blocks import BlockJournal, block_names
from baton.config_routing import RoutingConfig
from baton.frames import FrameStream
from baton.messages import Hello, Load
from baton.plane import PlaneServer
from baton.request import Sampling, Work
from router.choice import Choice
from router.peers import Peer, Pools, Role, WorkerAddress

PROMPT = tuple(range(300))
NAMES = block_names(PROMPT)


class Worker:
    def received(self, link: FrameStream, record: object) -> None:
        """Whatever it is, nothing is computed here."""

    def gone(self, link: FrameStream) -> None:
        """Nothing is held for a router."""

    def load(self) -> Load:
        return Load(0, 0, 0, 0, 100, 0, 0, 1, 0, prompt_token_s=0.001)


def work(name: str = "r", prompt: tuple[int, ...] = PROMPT, session: str = "") -> Work:
    return Work(name, prompt, Sampling(), 0, 10.0, session=session)


@contextlib.asynccontextmanager
async def house(held: dict[str, int]) -> AsyncIterator[Pools]:
    """A worker for each name, which holds so many blocks of the prompt; p... are prefill, d... decode workers."""
    pools, servers = Pools(connect_s=2), []
    addresses: dict[Role, list[WorkerAddress]] = {"prefill": [], "decode": []}
    for name, blocks in held.items():
        role: Role = "prefill" if name.startswith("p") else "decode"
        journal = BlockJournal()
        journal.change(NAMES[:blocks], held=True)
        server = PlaneServer(Worker(), Hello(role, name, name, "l", "float32"), host="127.0.0.1", journal=journal)
        await server.start()
        servers.append(server)
        addresses[role].append(WorkerAddress(role, name, "127.0.0.1", server.port, name))
    for role, listed in addresses.items():
        pools.update(role, listed)
    async with asyncio.timeout(5):
        while len(pools.index.match(NAMES, 0.0)) < len(held):
            await asyncio.sleep(0.01)
    try:
        yield pools
    finally:
        await pools.close()
        for server in servers:
            await server.close()


def choice(pools: Pools, routing: RoutingConfig | None = None, *, disaggregated: bool = True) -> Choice:
    return Choice(pools, decode_page_tokens=16, disaggregated=disaggregated, local_prefill=True, routing=routing)


def name(peer: Peer) -> str:
    return peer.address.worker_id


async def test_the_prompt_goes_to_its_holder_unless_that_failed() -> None:
    async with house({"p0": 0, "p1": 3, "p2": 0, "d0": 0}) as pools:
        chosen = choice(pools)
        assert name(chosen.prefill(work())) == "p1"
        assert name(chosen.prefill(work(), frozenset({"p1"}))) == "p0"
        assert name(chosen.prefill(work(), frozenset({"p0", "p1", "p2"}))) == "p1"  # nobody else is left
        assert chosen.uncached(work()) == 300 - 192


async def test_a_prompt_that_was_just_assigned_counts_as_held_there() -> None:
    async with house({"p0": 0, "p1": 0, "d0": 0}) as pools:
        chosen = choice(pools)
        other = work("other", tuple(range(1000, 1300)))
        [p1] = [peer for peer in pools.of("prefill") if name(peer) == "p1"]
        assert name(chosen.prefill(other)) == "p0"
        assert chosen.assigned(other, p1) == 300
        assert name(chosen.prefill(work("again", other.prompt))) == "p1"
        assert chosen.assigned(work("again", other.prompt), p1) == 300 - 256


async def test_a_conversation_goes_on_at_its_decode_worker_without_a_handoff() -> None:
    async with house({"p0": 1, "d0": 0, "d1": 4}) as pools:
        chosen = choice(pools)
        decode = chosen.decode(work())
        assert name(decode) == "d1"
        assert chosen.local(work(), decode)
        assert not chosen.local(work(), pools.of("decode")[0])


async def test_without_a_prefill_pool_the_decode_worker_is_everything() -> None:
    async with house({"d0": 0, "d1": 2}) as pools:
        chosen = choice(pools, disaggregated=False)
        decode = chosen.decode(work())
        assert name(decode) == "d1"
        assert chosen.local(work(), decode)
        assert chosen.uncached(work()) == 300 - 128


async def test_turns_are_taken_and_sessions_kept() -> None:
    async with house({"p0": 0, "p1": 3, "d0": 0, "d1": 4}) as pools:
        turns = choice(pools, RoutingConfig(strategy="round_robin"))
        assert [name(turns.prefill(work())) for _ in range(4)] == ["p1", "p0"] * 2
        assert [name(turns.decode(work())) for _ in range(4)] == ["d1", "d0"] * 2
        sessions = choice(pools, RoutingConfig(strategy="session"))
        homes = {name(sessions.prefill(work(str(number), session="ann"))) for number in range(5)}
        assert len(homes) == 1
        assert {name(sessions.prefill(work(session=f"s{number}"))) for number in range(20)} == {"p0", "p1"}
