"""Measures the handoff's stages on real KV: codecs between pages and bytes, and a transport between two processes."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pydoc_data import topics

from baton.config import PoolConfig
from baton.errors import BatonError, ConfigError
from baton.request import Sampling, Work
from engine.build import build_engine
from engine.cache import PagedKV
from engine.engine import Chunk
from engine.model import Model
from kvtransfer.arena import HostMemory
from kvtransfer.codecs import Codec, make_codec
from kvtransfer.protocol import block_digest
from kvtransfer.transports import make_exporter, make_fetcher
from placement.profile import CodecSpeed, Speed

SIZES = (64, 768)  # tokens of the two prompts through whose times the line of a Speed goes
REPEATS = 5
WIRE_SIZES = (16 << 10, 1 << 20)  # bytes; a block has at most 1 MiB
WIRE_REPEATS = 100
WIRE_BYTES = 64 << 20
PEER_S = 60.0


def measure_codecs(
    model: Model, encode_text: Callable[[str], list[int]], names: tuple[str, ...], max_context: int
) -> dict[str, CodecSpeed]:
    """Speeds and ratio of each codec on the KV of English text (CPython's own documentation topics)."""
    sizes = [min(size, max_context // 2) for size in SIZES]
    text = "\n".join(str(topics.topics[name]) for name in sorted(topics.topics))
    prompt = tuple(encode_text(text[: 16 * sizes[-1]])[: sizes[-1]])
    if len(prompt) < sizes[-1]:
        raise ConfigError(f"the text has {len(prompt)} tokens of {sizes[-1]}", field="profile.codecs")
    pages = _Pages()
    pool = PoolConfig(kv_tokens=2 * max_context, step_tokens=512)
    engine = build_engine(model, pool, max_context, pages)
    engine.add(Work("codec", prompt, Sampling(temperature=0.0, max_tokens=1), 0, 3600.0), prefill_only=True)
    while not engine.step():
        pass
    return {name: _codec(make_codec(name, model.layout), engine.cache, pages.latest, sizes) for name in names}


class _Pages:
    """Learns the block table of the one sequence that is prefilled."""

    def __init__(self) -> None:
        self.latest: tuple[int, ...] = ()

    def layer_written(self, layer: int, chunks: Sequence[Chunk]) -> None:
        self.latest = chunks[0].pages


def _codec(codec: Codec, cache: PagedKV, pages: tuple[int, ...], sizes: list[int]) -> CodecSpeed:
    encode_s, decode_s, wire_bytes = [], [], 0
    for tokens in sizes:
        times = [_layers(codec, cache, pages, tokens) for _ in range(REPEATS)]
        encode_s.append(statistics.median(t for t, _, _ in times))
        decode_s.append(statistics.median(t for _, t, _ in times))
        wire_bytes = times[0][2]
    raw = [tokens * cache.layout.layer_token_bytes for tokens in sizes]
    layers = cache.layout.layers
    return CodecSpeed(_line(raw, encode_s), _line(raw, decode_s), raw[-1] * layers / wire_bytes)


def _layers(codec: Codec, cache: PagedKV, pages: tuple[int, ...], tokens: int) -> tuple[float, float, int]:
    """Seconds per layer to gather, encode and sign, and to check, decode and scatter; bytes of all layers."""
    layers = cache.layout.layers
    staging = memoryview(bytearray(codec.bound(tokens)))
    encode_s = decode_s = 0.0
    wire_bytes = 0
    for layer in range(layers):
        started = time.perf_counter()
        nbytes = codec.encode(*cache.gather(layer, pages, 0, tokens), staging)
        signature = _sign(staging[:nbytes], layer, tokens, codec.name)
        encoded = time.perf_counter()
        if _sign(staging[:nbytes], layer, tokens, codec.name) != signature:
            raise BatonError("the staged bytes changed under the digest")
        keys, values = codec.decode(staging[:nbytes], tokens)
        cache.scatter(layer, pages, 0, keys, values)
        decode_s += time.perf_counter() - encoded
        encode_s += encoded - started
        wire_bytes += nbytes
    return encode_s / layers, decode_s / layers, wire_bytes


def _sign(data: memoryview, layer: int, tokens: int, codec: str) -> bytes:
    return block_digest(data, request_id="profile", epoch=1, layout="", layer=layer, start=0, count=tokens, codec=codec)


def _line(nbytes: list[int], seconds: list[float]) -> Speed:
    """The line through two sizes; all of it per byte where the larger one was not slower."""
    per_byte = (seconds[1] - seconds[0]) / (nbytes[1] - nbytes[0])
    if per_byte <= 0:
        return Speed(0.0, nbytes[1] / seconds[1])
    return Speed(max(0.0, seconds[0] - per_byte * nbytes[0]), 1 / per_byte)


def measure_wire(transport: str, ucx_tls: str = "") -> Speed:
    """One process fetches from another on this machine. Raises :class:`ConfigError` where the transport cannot work."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    peer = context.Process(target=_serve, args=(there, transport, ucx_tls), daemon=True)
    peer.start()
    there.close()
    try:
        if not here.poll(PEER_S):
            raise ConfigError(f"no peer within {PEER_S:.0f} s", field="handoff.transport")
        address = here.recv_bytes()
        return _fetch(transport, ucx_tls, address)
    except EOFError:
        raise ConfigError(
            f"the process that exports over {transport} failed to start", field="handoff.transport"
        ) from None
    finally:
        here.close()
        peer.join(PEER_S)
        if peer.is_alive():
            peer.kill()


def _serve(parent: Connection, transport: str, ucx_tls: str) -> None:
    memory = HostMemory(WIRE_BYTES)
    memory.view(0, WIRE_BYTES)[:] = bytes(WIRE_BYTES)  # resident, as staged bytes are
    exporter = make_exporter(transport, memory, name="profile-peer", host="127.0.0.1", ucx_tls=ucx_tls)
    try:
        parent.send_bytes(exporter.address())
        parent.poll(PEER_S)  # until the parent closes its end
    finally:
        exporter.close()


def _fetch(transport: str, ucx_tls: str, address: bytes) -> Speed:
    memory = HostMemory(WIRE_BYTES)
    fetcher = make_fetcher(transport, memory, name="profile-fetcher", ucx_tls=ucx_tls)
    try:
        source = fetcher.connect(address, PEER_S)
        medians = []
        for nbytes in WIRE_SIZES:
            times = []
            for at in range(WIRE_REPEATS + 5):
                offset = at * nbytes % (WIRE_BYTES - nbytes)
                started = time.perf_counter()
                source.fetch(offset, nbytes, offset, PEER_S)
                times.append(time.perf_counter() - started)
            medians.append(statistics.median(times[5:]))
        source.close()
        return _line(list(WIRE_SIZES), medians)
    finally:
        fetcher.close()
