"""What hostile bytes are thrown at, one function each: ``TARGETS[name](data)`` returns, or raises if Baton did wrong.

Run by ``fuzz.py`` under atheris, by ``test_fuzz.py`` under Hypothesis and over the kept corpus.
"""

from __future__ import annotations

import asyncio
import runpy
import socket
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from baton.config_handoff import CODECS
from baton.errors import ProtocolError
from baton.frames import FrameStream
from baton.handshake import demand, prove
from baton.layout import KVLayout
from baton.messages import PLANE
from baton.records import Registry, pack
from baton.secure import ClusterKey, Handshake, Seal, Untrusted
from kvtransfer.codecs import Codec, CodecError, make_codec
from kvtransfer.protocol import CONTROL, Drop

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

LIVE: dict[str, Any] = runpy.run_path(str(Path(__file__).with_name("ends.py")))


def _drawn(live: Callable[[Bytes], None]) -> Callable[[bytes], None]:
    return lambda data: live(Bytes(data))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "record": record,
    "frames": frames,
    "sealed": sealed,
    "handshake": handshake,
    "codec": codec,
    **{name: _drawn(live) for name, live in LIVE["LIVE"].items()},
}
