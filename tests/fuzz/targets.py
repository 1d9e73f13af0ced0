"""What hostile bytes are thrown at, one function each: ``TARGETS[name](data)`` returns, or raises if Baton did wrong.

Run by ``fuzz.py`` under atheris, by ``test_fuzz.py`` under Hypothesis and over the kept corpus.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import socket
import tracemalloc
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from baton.config_handoff import CODECS, HandoffConfig
from baton.errors import ProtocolError
from baton.frames import FrameStream
from baton.handshake import demand, prove
from baton.layout import KVLayout
from baton.messages import PLANE, Ticket
from baton.records import Registry, pack
from baton.request import TokenEvent
from baton.secure import ClusterKey, Handshake, Seal, Untrusted
from kvtransfer.arena import HostMemory
from kvtransfer.codecs import Codec, CodecError, make_codec
from kvtransfer.handoff import Landed
from kvtransfer.protocol import CONTROL, PROTOCOL, Attach, Begin, Block, Commit, Drop, Welcome, block_digest
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.transports import make_exporter

torch.set_num_threads(1)

# msgpack takes room for at most 10,000 items of an array before they came, in at most 1,024 arrays inside each other.
NESTED_BYTES = 1024 * 10_000 * 8 + (2 << 20)
PER_BYTE = 80  # an empty list of one byte on the wire is 56 bytes in Python, and 8 where it is held
KEY = ClusterKey("k" * 40)


@contextmanager
def bounded(nbytes: int) -> Iterator[None]:
    """What the block allocates at its peak stays within what ``nbytes`` of input may cost."""
    ours = not tracemalloc.is_tracing()
    if ours:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1] - before
        if ours:
            tracemalloc.stop()
    assert peak <= NESTED_BYTES + PER_BYTE * nbytes, f"{nbytes} bytes of input took {peak}"


class Bytes:
    """Values drawn from fuzzed bytes; zeros once they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> bool:
        return self._at < len(self._data)

    def take(self, nbytes: int) -> bytes:
        part = self._data[self._at : self._at + nbytes]
        self._at += nbytes
        return part.ljust(nbytes, b"\0")

    def below(self, limit: int) -> int:
        return int.from_bytes(self.take(2), "little") % limit

    def pick(self, options: Any) -> Any:
        return options[self.below(len(options))]

    def rest(self) -> bytes:
        return self._data[self._at :]


# ---- bytes to records


def record(data: bytes) -> None:
    """A record that unpacks packs to bytes that unpack to the same; anything else is a ProtocolError."""
    for registry in (PLANE, CONTROL):
        with suppress(ProtocolError), bounded(len(data)):
            found = registry.unpack(data)
            assert pack(registry.unpack(pack(found))) == pack(found)


class _Wire:
    """Frame streams that read given bytes; they write to a socket that nobody reads."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._near, self._far = socket.socketpair()
        _, self._writer = self.run(asyncio.open_connection(sock=self._near))

    def run(self, work: Any) -> Any:
        return self._runner.run(work)

    def stream(self, data: bytes, registry: Registry, seals: tuple[Seal, Seal] | None = None) -> FrameStream:
        return FrameStream(self.reader(data), self._writer, registry, seals)

    def reader(self, data: bytes) -> asyncio.StreamReader:
        reader = asyncio.StreamReader(loop=self._runner.get_loop())
        reader.feed_data(data)
        reader.feed_eof()
        return reader

    @property
    def writer(self) -> asyncio.StreamWriter:
        self._far.setblocking(False)
        with suppress(BlockingIOError):
            while self._far.recv(1 << 16):
                pass
        return self._writer


_wires: list[_Wire] = []


def _wire() -> _Wire:
    if not _wires:
        _wires.append(_Wire())
    return _wires[0]


async def _read_all(stream: FrameStream) -> list[object]:
    found = []
    with suppress(ProtocolError):
        while (got := await stream.receive()) is not None:
            found.append(got)
    return found


def frames(data: bytes) -> None:
    """Open frames: only records come out, and no more bytes than came in."""
    wire = _wire()
    with bounded(len(data)):
        found = wire.run(_read_all(wire.stream(data, CONTROL)))
    assert sum(4 + len(pack(one)) for one in found) <= 4 * len(data) + 64


def sealed(data: bytes) -> None:
    """Behind a handshake, nothing that the peer did not seal is ever taken for a record."""
    wire = _wire()
    near, far = Handshake(KEY, CONTROL.fingerprint, accepts=False), Handshake(KEY, CONTROL.fingerprint, accepts=True)
    far.meet(near.hello)
    near.meet(far.hello)
    out, _ = near.check(far.proof)
    first = out.close(pack(Drop("r", 1, "genuine")))
    honest = len(first).to_bytes(4, "little") + first
    with bounded(len(data)):
        found = wire.run(_read_all(wire.stream(honest + data, CONTROL, far.check(near.proof))))
    assert found == [Drop("r", 1, "genuine")]


def handshake(data: bytes) -> None:
    """Whoever lacks the key is refused by both ends, whatever it says."""
    wire = _wire()
    for end in (prove, demand):
        try:
            wire.run(end(wire.reader(data), wire.writer, KEY, CONTROL.fingerprint))
        except Untrusted:
            continue
        raise AssertionError(f"{end.__name__} trusts {data.hex()}")


# ---- bytes to KV

_LAYOUTS = [KVLayout("m", 2, 2, 8, "float32"), KVLayout("m", 2, 1, 16, "bfloat16"), KVLayout("m", 2, 3, 64, "bfloat16")]
_COUNTS = (1, 2, 33, 127, 128, 129, 300)
_codecs: dict[tuple[str, int], Codec] = {}
_genuine: dict[tuple[str, int, int, int], bytes] = {}


def _codec(name: str, layout: int) -> Codec:
    if (name, layout) not in _codecs:
        _codecs[name, layout] = make_codec(name, _LAYOUTS[layout])
    return _codecs[name, layout]


def _block(name: str, layout: int, count: int, place: int) -> bytes:
    """What ``name`` makes of some KV, at the start, the middle or the end of a prompt."""
    if (name, layout, count, place) not in _genuine:
        shape = _LAYOUTS[layout]
        random = torch.Generator().manual_seed(count)
        dtype = torch.float32 if shape.dtype == "float32" else torch.bfloat16
        keys, values = torch.randn((2, count, shape.kv_heads, shape.head_dim), generator=random).to(dtype)
        codec = _codec(name, layout)
        into = memoryview(bytearray(codec.bound(count)))
        size = codec.encode(keys, values, into, before=9999 * (place > 0), after=9999 * (place < 2))
        _genuine[name, layout, count, place] = bytes(into[:size])
    return _genuine[name, layout, count, place]


def codec(data: bytes) -> None:
    """A decoder raises CodecError or returns KV of the block's shape. ``data``: which codec, layout, count, then either
    a whole block or changes to a genuine one."""
    source = Bytes(data)
    name, layout, count = source.pick(CODECS), source.below(len(_LAYOUTS)), source.pick(_COUNTS)
    changes = source.below(4)
    if changes == 0:
        block = bytearray(source.rest())
    else:
        block = bytearray(_block(name, layout, count, changes - 1))
        while source.left and block:
            _change(block, source)
    _decode(name, layout, count, bytes(block))


def _change(block: bytearray, source: Bytes) -> None:
    at = int.from_bytes(source.take(3), "little") % len(block)
    match source.below(5):
        case 0:
            block[at] ^= 1 << source.below(8)
        case 1:
            block[at : at + 4] = source.take(4)
        case 2:
            del block[at:]
        case 3:
            block += source.take(source.below(64))
        case 4:
            del block[at : at + 1 + source.below(8)]


def _decode(name: str, layout: int, count: int, block: bytes) -> None:
    shape = _LAYOUTS[layout]
    unpacked = 2 * count * shape.kv_heads * shape.head_dim * 4
    with suppress(CodecError), bounded(len(block) + 4 * unpacked):
        for half in _codec(name, layout).decode(memoryview(bytearray(block)), count):
            assert half.shape == (count, shape.kv_heads, shape.head_dim)
            assert str(half.dtype) == f"torch.{shape.dtype}"
            half.clone()  # every value can be read


# ---- records to pages

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
        for layer in range(LAYOUT.layers):
            raw.encode(kv(layer), kv(layer), self.memory.view(layer * 1024, self.nbytes))
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
            self.memory.view(layer * 1024, self.nbytes), request_id="r", epoch=self.epoch, layout=LAYOUT.fingerprint,
            layer=layer, start=0, count=TOKENS, codec="raw",
        )  # fmt: skip

    def block(self, layer: int) -> Block:
        return Block("r", self.epoch, layer, layer, 0, TOKENS, "raw", layer * 1024, self.nbytes, self.digest(layer))

    def by_the_book(self) -> list[object]:
        """What an honest sender says after Attach."""
        blocks = [self.block(layer) for layer in range(LAYOUT.layers)]
        return [Begin("r", self.epoch, TOKENS, "raw"), *blocks, Commit("r", self.epoch, len(blocks), FIRST, 0.0, 0.0)]


_houses: list[_House] = []


def _house() -> _House:
    if not _houses:
        _houses.append(_House())
    return _houses[0]


def _value(hint: Any, source: Bytes, house: _House) -> Any:
    """A value that the type of a record's field allows."""
    args = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _filled(typing.cast(type, hint), source, house)
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


def _filled(kind: type, source: Bytes, house: _House) -> Any:
    hints = typing.get_type_hints(kind)
    return kind(*(_value(hints[field.name], source, house) for field in dataclasses.fields(kind)))


def _said(source: Bytes, house: _House, script: list[object]) -> list[object]:
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
                said += [_filled(source.pick(kinds), source, house), honest]
            case _:
                said.append(honest)
    while source.left and len(said) < 40:
        said.append(_filled(source.pick(kinds), source, house))
    return said


def receiver(data: bytes) -> None:
    """Whatever a sender says, only genuine KV is written, where it belongs and once; nothing stays held."""
    house = _house()
    house.epoch += 1
    house.run(_hand_to(house, Bytes(data)))


async def _hand_to(house: _House, source: Bytes) -> None:
    written: list[int] = []

    def write(layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        assert start == 0, start
        assert layer not in written, layer
        assert torch.equal(keys, kv(layer)), layer
        assert torch.equal(values, kv(layer)), layer
        written.append(layer)

    house.receiver.reserve("r", house.epoch, tokens=TOKENS, codec="raw", budget_s=5.0, write=write)
    attach = Attach(PROTOCOL, "x", "gx", "gd", LAYOUT.family, LAYOUT.dtype, "loopback", house.exporter.address())
    script = [attach, *house.by_the_book()]
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


def sender(data: bytes) -> None:
    """Whatever a receiver answers, the handoff ends, landed only if all is acknowledged, and frees its staging."""
    house = _house()
    house.epoch += 1
    house.run(_answer(house, Bytes(data)))


async def _answer(house: _House, source: Bytes) -> None:
    welcome = Welcome(*(() if not dataclasses.fields(Welcome) else _welcome(house)))
    said = _said(source, house, [welcome])
    acked: set[int] = set()
    for one in said:
        acked.update(getattr(one, "seqs", ()))

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
    assert not isinstance(outcome, Landed) or acked >= {0, 1}, said
    await _idle(lambda: (s := house.sender.stats()).handoffs + s.staging_bytes_used)


def _welcome(house: _House) -> list[Any]:
    """An honest one."""
    known = {"worker_id": "d", "generation": "gd"}
    hints = typing.get_type_hints(Welcome)
    empty = Bytes(b"")
    return [known.get(f.name, _value(hints[f.name], empty, house)) for f in dataclasses.fields(Welcome)]


async def _idle(held: Callable[[], int]) -> None:
    async with asyncio.timeout(4):
        while held():
            await asyncio.sleep(0.001)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "record": record,
    "frames": frames,
    "sealed": sealed,
    "handshake": handshake,
    "codec": codec,
    "receiver": receiver,
    "sender": sender,
}
