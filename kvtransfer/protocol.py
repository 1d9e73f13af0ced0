"""What sender and receiver say on their control connection. KV bytes never travel here; the transport pulls them.

    sender ──Attach──► receiver    who I am, where my staged bytes are; answered by Welcome or Refused
    sender ──Begin───► receiver    the handoff of a ticket starts
    sender ──Parcel──► receiver    these encoded bytes are staged: fetch them, in one go
    sender ──Commit──► receiver    that was the last parcel, and this is the first token
    sender ◄──Ack───── receiver    this parcel is in my pages; its staging is yours again
    sender ◄─Complete─ receiver    every token of every layer is in my pages
    sender ◄──Drop───► receiver    this handoff is over without result
    sender ◄──Alive──► receiver    heartbeat while any handoff is under way

The sender connects and speaks first. The end of the stream is the failure signal for every handoff on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from baton.layout import KVLayout
from baton.records import Registry
from baton.request import TokenEvent

if TYPE_CHECKING:  # as with xxhash below
    from kvtransfer.signing import BlockKey

PROTOCOL = 3
DIGEST_BYTES = 16
# At one MiB of raw KV, encoding and decoding a block take near a millisecond (docs/adr/0003-landing-buffers.md).
BLOCK_RAW_BYTES = 1 << 20
MOST_BLOCKS = 64  # of one parcel
GROUP_TOKENS = 128  # of the codecs that share scales along tokens: only a span's last block has a shorter group
_BLOCK_ALIGN = 64  # more than any codec's integers need


def block_tokens(layout: KVLayout) -> int:
    """Most tokens in one block."""
    most = max(1, BLOCK_RAW_BYTES // layout.layer_token_bytes)
    return most // GROUP_TOKENS * GROUP_TOKENS or most


@dataclass(frozen=True, slots=True)
class Attach:
    protocol: int
    worker_id: str
    generation: str  # of the sender's process
    receiver_generation: str  # the process that the ticket came from; another one refuses
    layout: str  # KVLayout.family
    dtype: str  # of the sender's KV: what its blocks decode to
    transport: str
    address: bytes  # the exporter's address, in the transport's own form
    staging_bytes: int = 0  # exported at the address: what a probe may read


@dataclass(frozen=True, slots=True)
class DecodeSpeed:
    """How fast the receiver decodes: see :class:`kvtransfer.chooser.Speed`."""

    codec: str
    block_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Probed:
    """The link as the receiver found it just now: see :class:`kvtransfer.chooser.Link`."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Welcome:
    worker_id: str
    generation: str
    decode: tuple[DecodeSpeed, ...] = ()
    probe: Probed | None = None
    cores: float = 0.0  # processors of this process; 0 is not known
    parcel_bytes: int = 0  # most that a parcel of several blocks may take; one block may always be sent


@dataclass(frozen=True, slots=True)
class Refused:
    reason: str


@dataclass(frozen=True, slots=True)
class Begin:
    request_id: str
    epoch: int
    tokens: int
    codec: str  # the ticket's


@dataclass(frozen=True, slots=True)
class Block:
    """KV of ``count`` tokens from ``start`` in one layer, encoded to ``nbytes``."""

    layer: int
    start: int
    count: int
    nbytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Parcel:
    """Blocks in one codec, one behind the other from ``offset`` of the staging arena on."""

    request_id: str
    epoch: int
    seq: int  # counts this handoff's parcels from 0, without gaps
    codec: str
    offset: int
    blocks: tuple[Block, ...]

    @property
    def nbytes(self) -> int:
        """From the first block's begin to the last one's end."""
        return sum(aligned(block.nbytes) for block in self.blocks[:-1]) + self.blocks[-1].nbytes if self.blocks else 0

    @property
    def tokens(self) -> int:
        """(layer, token) pairs in it."""
        return sum(block.count for block in self.blocks)

    def places(self) -> Iterator[tuple[Block, int]]:
        """Every block, and where it begins behind ``offset``."""
        at = 0
        for block in self.blocks:
            yield block, at
            at += aligned(block.nbytes)


def aligned(nbytes: int) -> int:
    """How far behind a block of ``nbytes`` the next one begins; what lies between means nothing."""
    return -(-nbytes // _BLOCK_ALIGN) * _BLOCK_ALIGN


@dataclass(frozen=True, slots=True)
class Commit:
    request_id: str
    epoch: int
    parcels: int
    first: TokenEvent
    encode_exposed_s: float  # from the first token until the last parcel was staged
    encode_busy_s: float  # gathering, encoding and signing, hidden or not


@dataclass(frozen=True, slots=True)
class Ack:
    request_id: str
    epoch: int
    seq: int
    fetch_s: float = 0.0  # what fetching the parcel took, without waiting for a processor; 0 was not timed
    landing: int = 1  # handoffs under way at this receiver, from whomever
    fetch_cpu_s: float = 0.0  # of the thread that fetched it


@dataclass(frozen=True, slots=True)
class Complete:
    request_id: str
    epoch: int
    wire_s: float
    land_s: float
    busy_s: float  # encode + wire + land
    nbytes: int
    codec_tokens: dict[str, int] = field(default_factory=dict)  # (layer, token) pairs that crossed in each codec


@dataclass(frozen=True, slots=True)
class Drop:
    request_id: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Alive:
    landed: int = 0  # blocks, from whomever, by a receiver: where it grows, nobody's parcel is stuck there


CONTROL = Registry(Attach, Welcome, Refused, Begin, Parcel, Commit, Ack, Complete, Drop, Alive)


def block_digest(
    encoded: memoryview,
    *, request_id: str, epoch: int, layout: str, layer: int, start: int, count: int, codec: str,
    key: BlockKey | None = None,
) -> bytes:  # fmt: skip
    """Over where the block belongs and its encoded bytes: keyed between members of a cluster, else xxh3-128.

    xxh3 catches corruption and mix-ups at 45 GB/s, but whoever sits on the data path could craft bytes that fit it; the
    keyed digest runs at 7 GB/s, where blake2b makes 0.8 and HMAC-SHA256 1.5 (ADR 10).
    """
    place = f"{len(request_id)}:{request_id}|{epoch}|{layout}|{layer}|{start}|{count}|{codec}|{len(encoded)}|"
    if key is not None:
        return key.digest(place.encode(), encoded, DIGEST_BYTES)
    import xxhash  # only by who signs: codecs are tried on machines that have little more than torch

    state = xxhash.xxh3_128(place.encode())
    state.update(encoded)
    return state.digest()
