"""What models shipped once per connection would save on real KV: ``python -m bench.tables``.

A zstd dictionary, which holds Huffman tables, is trained on every stream of a prompt's first chunk and used for the
chunks that follow. Streams are what a codec compresses on its own: today, and with levels dealt out by head and eight
channels, which dictionaries would make cheap. The dictionaries themselves are not counted: each crosses once.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
import zstandard
from torch import Tensor

from baton.layout import KVLayout
from bench import report
from bench.codec import Subject, subject_of
from kvtransfer.codecs import make_codec
from kvtransfer.codecs.block import Words
from kvtransfer.codecs.entropy import Entropy, literals
from kvtransfer.codecs.even import EvenCodec

CHUNK, CHUNKS, LAYERS = 512, 4, 10
GROUP = 8  # channels
SAMPLE_BYTES, DICTIONARY_BYTES = 256, 1024
ID_BYTES = 4  # of the dictionary, in a frame: the connection would know it
Key: TypeAlias = tuple[int, ...]


class Recorder(Entropy):
    """Keeps what it is given to compress."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Words] = []
        self.packed = 0  # bytes

    def pack(self, plain: Words, into: memoryview) -> int:
        self.given.append(plain.copy())
        nbytes = super().pack(plain, into)
        self.packed += nbytes
        return nbytes


@dataclass(slots=True)
class Sum:
    values: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    dictionaries: int = 0  # bytes


def recorded(name: str, layout: KVLayout, kv: Tensor) -> tuple[list[tuple[Key, Words]], int]:
    """What the codec compresses of one block from the middle of a prompt, and the block's other bytes."""
    codec, recorder = make_codec(name, layout), Recorder()
    codec._entropy = recorder  # type: ignore[attr-defined]
    room = memoryview(bytearray(codec.bound(CHUNK)))
    keys, values = kv.chunk(2, dim=1)
    nbytes = codec.encode(keys, values, room, before=CHUNK, after=CHUNK)
    places: list[int] = [-1]
    if isinstance(codec, EvenCodec):  # K's streams are classes of channels, of which a block may lack some
        places = [*np.unique(codec._parts(room, CHUNK, codec._head_bytes).classes).tolist(), -1]
    streams: list[tuple[Key, Words]] = [((place,), part) for place, part in zip(places, recorder.given, strict=True)]
    return streams, nbytes - recorder.packed


def dealt(plain: Words, layout: KVLayout, width: int) -> Iterator[tuple[Key, Words]]:
    """Levels of whole heads, [heads, tokens, head_dim] at ``width`` bits, by head and eight channels."""
    per_byte = 8 // width
    for head, packed in enumerate(plain.reshape(-1, CHUNK * layout.head_dim // per_byte)):
        parts = [(packed >> (width * part)) & ((1 << width) - 1) for part in range(per_byte)]
        levels = np.concatenate(parts).reshape(CHUNK, layout.head_dim)
        for first in range(0, layout.head_dim, GROUP):
            group = levels[:, first : first + GROUP].reshape(per_byte, -1)
            packed_group = np.zeros_like(group[0])
            for place, part in enumerate(group):
                packed_group |= part << (width * place)
            yield (-1, head, first), packed_group


def trained(plain: Words) -> zstandard.ZstdCompressionDict | None:
    """None where there is too little to train on."""
    data = plain.tobytes()
    samples: list[bytes | bytearray | memoryview] = [
        data[at : at + SAMPLE_BYTES] for at in range(0, len(data), SAMPLE_BYTES)
    ]
    try:
        return zstandard.train_dictionary(DICTIONARY_BYTES, samples, k=64, d=8)
    except zstandard.ZstdError:
        return None


@dataclass(slots=True)
class Way:
    """One way to compress the streams of one layer's blocks; dictionaries come from its first block."""

    learns: bool
    total: Sum
    known: dict[Key, zstandard.ZstdCompressor] = field(default_factory=dict)

    def block(self, streams: list[tuple[Key, Words]], other: int, *, first: bool) -> None:
        if first:
            if self.learns:
                self._learn(streams)
            return
        plain = zstandard.ZstdCompressor(compression_params=literals())
        started = time.perf_counter()
        sizes = [len(self.known.get(key, plain).compress(part.data)) for key, part in streams]
        self.total.seconds += time.perf_counter() - started
        for (key, part), size in zip(streams, sizes, strict=True):
            self.total.nbytes += min(size - (ID_BYTES if key in self.known else 0), part.nbytes)
        self.total.nbytes += other

    def _learn(self, streams: list[tuple[Key, Words]]) -> None:
        for key, part in streams:
            if (found := trained(part)) is not None:
                self.total.dictionaries += len(found.as_bytes())
                self.known[key] = zstandard.ZstdCompressor(dict_data=found, compression_params=literals())


def measured(name: str, layout: KVLayout, layers: list[Tensor]) -> dict[str, Sum]:
    totals: dict[str, Sum] = defaultdict(Sum)
    for kv in layers:
        ways = {
            (how, learns): Way(learns, totals[f"{how}, {'dictionaries' if learns else 'as it is'}"])
            for how in ("streams of today", "streams by head and 8 channels")
            for learns in (False, True)
        }
        for chunk in range(CHUNKS):
            today, other = recorded(name, layout, kv[chunk * CHUNK : (chunk + 1) * CHUNK])
            fine = [*today[:-1], *dealt(today[-1][1], layout, 8 if name == "int8-zstd" else 4)]
            forms = {"streams of today": today, "streams by head and 8 channels": fine}
            for (how, _), way in ways.items():
                way.block(forms[how], other, first=chunk == 0)
                way.total.values += 0 if chunk == 0 else kv[:CHUNK].numel()
    return totals


def main() -> None:
    torch.set_num_threads(1)
    model, text = subject_of()
    subject = Subject(model, CHUNK * CHUNKS, 1)
    layers = subject.prefill(text[20_000:])[:: model.spec.layers // LAYERS]
    result = {}
    for name in ("int8-zstd", "int4-zstd"):
        for how, one in measured(name, subject.layout, layers).items():
            row = {
                "bits_per_value": 8 * one.nbytes / one.values,
                "gb_per_s": 2 * one.values / one.seconds / 1e9,
                "dictionary_bytes_per_layer": one.dictionaries / len(layers),
            }
            result[f"{name}, {how}"] = row
            print(f"{name:10} {how:45} {row['bits_per_value']:.4f} bits {row['gb_per_s']:.2f} GB/s of bfloat16 KV, "
                  f"{row['dictionary_bytes_per_layer']:.0f} bytes of dictionaries a layer")  # fmt: skip
    report.save("codec-tables", result)


if __name__ == "__main__":
    main()
