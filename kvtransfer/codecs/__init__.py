"""KV blocks as bytes and back: the ladder from ``raw`` to two bits a value (docs/codecs.md, ADR 8)."""

from __future__ import annotations

from collections.abc import Iterable

from baton.layout import KVLayout
from kvtransfer.arena import ALIGN
from kvtransfer.codecs.block import Codec, CodecError
from kvtransfer.codecs.even import EVEN, EvenCodec
from kvtransfer.codecs.lossless import LosslessCodec
from kvtransfer.codecs.quantised import LADDER, QuantisedCodec
from kvtransfer.codecs.raw import RawCodec
from kvtransfer.protocol import block_tokens

__all__ = ["Codec", "CodecError", "largest_block", "make_codec"]

COMPRESSED = "-zstd"


def make_codec(name: str, layout: KVLayout) -> Codec:
    """The codec called ``name``; raises ValueError for a name that is none."""
    match name:
        case "raw":
            return RawCodec(layout)
        case "lossless":
            return LosslessCodec(layout)
    if (even := EVEN.get(name)) is not None:
        return EvenCodec(name, even, layout)
    level = LADDER.get(name.removesuffix(COMPRESSED))
    if level is None:
        raise ValueError(f"codec {name!r}")
    return QuantisedCodec(name, level, layout, compress=name.endswith(COMPRESSED))


def largest_block(codecs: Iterable[Codec], layout: KVLayout) -> int:
    """Bytes of the largest block that any of ``codecs`` may produce."""
    return max(codec.bound(block_tokens(layout)) for codec in codecs) + ALIGN
