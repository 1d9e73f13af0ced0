"""A receiver and a sender that run for as long as the fuzzing does, and peers that say anything to them.

``targets.py`` loads this and draws each target's ``Source`` from the fuzzed bytes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch

from baton.config_handoff import HandoffConfig
from baton.errors import ProtocolError
from baton.frames import FrameStream
from baton.layout import KVLayout
from baton.messages import Ticket
from baton.request import TokenEvent
from kvtransfer.arena import HostMemory
from kvtransfer.codecs import make_codec
from kvtransfer.handoff import Landed
from kvtransfer.protocol import (
    CONTROL,
    PROTOCOL,
    Ack,
    Attach,
    Begin,
    Block,
    Commit,
    Parcel,
    Welcome,
    aligned,
    block_digest,
)
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.transports import make_exporter


class Source(Protocol):
    """Where choices come from; zeros for ever once it is used up."""

    @property
    def left(self) -> bool: ...

    def below(self, limit: int) -> int: ...

    def pick(self, options: Any) -> Any: ...


LAYOUT = KVLayout("m", 2, 1, 8, "float32")
CONFIG = HandoffConfig(transport="loopback", codec="raw", stall_s=0.5, landing_bytes=4 << 20, staging_bytes=4 << 20)
TOKENS = 4
FIRST = TokenEvent("r", 0, 1)
_NUMBERS = (0, 1, 2, 3, 4, 5, -1, 256, 4096, 1 << 31, (1 << 63) - 1, -(1 << 63), 1 << 40)


def kv(layer: int) -> torch.Tensor:
    return torch.full((TOKENS, 1, 8), float(layer + 1))


class _Loud(logging.Handler):
    """What is logged as an error is one: it fails the input."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, entry: logging.LogRecord) -> None:
        self.said.append(self.format(entry))


class _House:
    """A receiver and a sender that stay, with one staging memory that holds every layer's genuine block."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._loud = _Loud()
        logging.getLogger().addHandler(self._loud)
        self.memory = HostMemory(4096)
        self.exporter = make_exporter("loopback", self.memory, name="x", host="", ucx_tls="")
        raw = make_codec("raw", LAYOUT)
        self.nbytes = raw.bound(TOKENS)
        self.step = aligned(self.nbytes)
        for layer in range(LAYOUT.layers):
            raw.encode(kv(layer), kv(layer), self.memory.view(layer * self.step, self.nbytes))
        self.receiver = Receiver(LAYOUT, CONFIG, worker_id="d", generation="gd")
        self.sender = Sender(LAYOUT, CONFIG, worker_id="p", generation="gp")
        self.run(self.receiver.start())
        self.run(self.sender.start())
        self.epoch = 0

    def run(self, work: Any) -> Any:
        self._runner.get_loop().set_exception_handler(lambda _, context: self._loud.said.append(str(context)))
        result = self._runner.run(work)
        said, self._loud.said = self._loud.said, []
        assert not said, said
        return result

    def digest(self, layer: int) -> bytes:
        return block_digest(
            self.memory.view(layer * self.step, self.nbytes), request_id="r", epoch=self.epoch,
            layout=LAYOUT.fingerprint, layer=layer, start=0, count=TOKENS, codec="raw",
        )  # fmt: skip

    def block(self, layer: int) -> Block:
        return Block(layer, 0, TOKENS, self.nbytes, self.digest(layer))

    def parcels(self, together: bool) -> list[Parcel]:
        """Every layer's block, in one parcel or in one each."""
        blocks = [self.block(layer) for layer in range(LAYOUT.layers)]
        if together:
            return [Parcel("r", self.epoch, 0, "raw", 0, tuple(blocks))]
        return [Parcel("r", self.epoch, seq, "raw", seq * self.step, (block,)) for seq, block in enumerate(blocks)]

    def by_the_book(self, together: bool) -> list[object]:
        """What an honest sender says after Attach."""
        parcels = self.parcels(together)
        return [Begin("r", self.epoch, TOKENS, "raw"), *parcels, Commit("r", self.epoch, len(parcels), FIRST, 0.0, 0.0)]


_houses: list[_House] = []


def opened() -> _House:
    if not _houses:
        _houses.append(_House())
    return _houses[0]


def _value(hint: Any, source: Source, house: _House) -> Any:
    """A value that the type of a record's field allows."""
    args = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return filled(typing.cast(type, hint), source, house)
    if typing.get_origin(hint) is tuple:
        return tuple(_value(args[0], source, house) for _ in range(source.below(4)))
    if typing.get_origin(hint) is dict:
        return {str(index): _value(args[1], source, house) for index in range(source.below(3))}
    if typing.get_origin(hint) is types.UnionType:
        return None if source.below(2) else _value(args[0], source, house)
    plain: dict[Any, Callable[[], Any]] = {
        int: lambda: source.pick((house.epoch, house.nbytes, *_NUMBERS)),
        float: lambda: source.pick((0.0, 1.5, -1.0, 1e308, float("inf"), float("nan"))),
        str: lambda: source.pick(("r", "raw", "lossless", "", "gd", "int4", "q", "\0" * 70_000, LAYOUT.fingerprint)),
        bytes: lambda: source.pick((house.digest(0), house.digest(1), bytes(16), b"", house.exporter.address())),
        bool: lambda: bool(source.below(2)),
    }
    return plain[hint]()


def filled(kind: type, source: Source, house: _House) -> Any:
    hints = typing.get_type_hints(kind)
    return kind(*(_value(hints[field.name], source, house) for field in dataclasses.fields(kind)))


def _said(source: Source, house: _House, script: list[object]) -> list[object]:
    """``script``, with records dropped, repeated, changed in one field, or made up."""
    kinds = list(CONTROL._records.values())
    said = []
    for honest in script:
        match source.below(8):
            case 0:
                continue
            case 1:
                said += [honest, honest]
            case 2:
                field = source.pick(dataclasses.fields(typing.cast(Any, honest)))
                hint = typing.get_type_hints(type(honest))[field.name]
                said.append(dataclasses.replace(typing.cast(Any, honest), **{field.name: _value(hint, source, house)}))
            case 3:
                said += [filled(source.pick(kinds), source, house), honest]
            case _:
                said.append(honest)
    while source.left and len(said) < 40:
        said.append(filled(source.pick(kinds), source, house))
    return said


def receiver(source: Source) -> None:
    """Whatever a sender says, only genuine KV is written, where it belongs and once; nothing stays held."""
    house = opened()
    house.epoch += 1
    house.run(_hand_to(house, source))


async def _hand_to(house: _House, source: Source) -> None:
    written: list[int] = []

    def write(layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        assert start == 0, start
        assert layer not in written, layer
        assert torch.equal(keys, kv(layer)), layer
        assert torch.equal(values, kv(layer)), layer
        written.append(layer)

    house.receiver.reserve("r", house.epoch, tokens=TOKENS, codec="raw", budget_s=5.0, write=write)
    attach = Attach(PROTOCOL, "x", "gx", "gd", LAYOUT.family, LAYOUT.dtype, "loopback", house.exporter.address())
    script = [attach, *house.by_the_book(together=bool(source.below(2)))]
    stream = await FrameStream.connect("127.0.0.1", house.receiver.port, CONTROL, timeout_s=2.0)
    said = _said(source, house, script)
    honest = said == script
    for one in said:
        stream.send(one)
    async with asyncio.timeout(4):
        if honest:
            assert isinstance(await house.receiver.outcome("r"), Landed)
        await asyncio.sleep(0)
        await stream.close()
        outcome = await house.receiver.outcome("r") if written else None
        await house.receiver.release("r")
    assert not isinstance(outcome, Landed) or sorted(written) == [0, 1], written
    await _idle(lambda: (s := house.receiver.stats()).leases + s.landing_bytes_used + s.quarantined_bytes)


def sender(source: Source) -> None:
    """Whatever a receiver answers, the handoff ends, landed only if all is acknowledged, and frees its staging."""
    house = opened()
    house.epoch += 1
    house.run(_answer(house, source))


async def _answer(house: _House, source: Source) -> None:
    said = _said(source, house, [Welcome("d", "gd")])
    acked: set[int] = set()
    for one in said:
        if isinstance(one, Ack):
            acked.add(one.seq)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = FrameStream(reader, writer, CONTROL)
        with suppress(ProtocolError):
            await stream.receive()
        for one in said:
            stream.send(one)
        await asyncio.sleep(0.002)  # the sender stages and announces meanwhile
        await stream.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    ticket = Ticket("r", house.epoch, "127.0.0.1", port, "gd", LAYOUT.family, "raw", "loopback")
    outgoing = house.sender.open(ticket, tokens=TOKENS, budget_s=5.0, gather=lambda layer, *_: (kv(layer), kv(layer)))
    for layer in range(LAYOUT.layers):
        outgoing.push(layer, 0, TOKENS)
    outgoing.finish(FIRST)
    async with asyncio.timeout(4):
        outcome = await outgoing.outcome()
        await outgoing.encoded()
    server.close()
    assert not isinstance(outcome, Landed) or acked >= set(range(outgoing._dispatch.announced)), said
    await _idle(lambda: (s := house.sender.stats()).handoffs + s.staging_bytes_used)


async def _idle(held: Callable[[], int]) -> None:
    async with asyncio.timeout(4):
        while held():
            await asyncio.sleep(0.001)


LIVE: dict[str, Callable[[Source], None]] = {"receiver": receiver, "sender": sender}
