"""How fast this machine's codecs are: measured at start-up, in bounded time, on KV-like data of the layout's shape.

What is timed is what a worker does with a block: read it from pages, encode and sign; check, decode and write to pages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from baton.config import LOSS
from baton.layout import KVLayout
from kvtransfer.chooser import Candidate, Speed
from kvtransfer.codecs import Codec, make_codec
from kvtransfer.protocol import block_digest, block_tokens

log = logging.getLogger(__name__)

BUDGET_S = 0.4
LARGE_TOKENS = 512  # a chunk of prefill, where a block holds as many
SMALL_SHARE = 16
REPEATS = 3
_LEAST_S = 1e-9
_FASTEST = 1e13  # bytes per second, for a stage without a cost of its own


@dataclass(frozen=True, slots=True)
class _Timing:
    encode_s: float
    decode_s: float
    nbytes: int


def measure_codecs(layout: KVLayout, names: Sequence[str], *, budget_s: float = BUDGET_S) -> tuple[Candidate, ...]:
    """Ratio and speeds of ``names``, in order, for as many as ``budget_s`` allows; the first one always.

    CPU-bound: call it from a thread of its own.
    """
    deadline = time.monotonic() + budget_s
    large = min(LARGE_TOKENS, block_tokens(layout))
    small = max(1, large // SMALL_SHARE)
    kv = _kv_like(layout, large)
    found: list[Candidate] = []
    for name in names:
        if found and time.monotonic() >= deadline:
            log.warning("no time to measure codecs %s; they are not chosen", ", ".join(names[len(found) :]))
            break
        codec = make_codec(name, layout)
        timings = [_timed(codec, kv[0][:count], kv[1][:count], deadline) for count in (small, large)]
        found.append(_candidate(name, [count * layout.layer_token_bytes for count in (small, large)], timings))
    return tuple(found)


def describe(candidates: Sequence[Candidate]) -> str:
    """For the log: ratio, and GB/s of raw KV to encode and to decode."""
    return ", ".join(
        f"{one.name} {one.ratio:.2f}x {one.encode.bytes_per_s / 1e9:.1f}/{one.decode.bytes_per_s / 1e9:.1f}"
        for one in candidates
    )


def _kv_like(layout: KVLayout, tokens: int) -> tuple[Tensor, Tensor]:
    """[tokens, kv_heads, head_dim] each. K's channels have means and widths of their own, V's only widths, as in real
    KV (arXiv:2402.02750); what decides an entropy coder's speed and ratio is the spread of the exponents."""
    draw = torch.Generator().manual_seed(0)
    shape = (tokens, layout.kv_heads, layout.head_dim)
    dtype = torch.float32 if layout.dtype == "float32" else torch.bfloat16
    means = 2.0 * torch.randn(1, *shape[1:], generator=draw)
    widths = torch.exp(0.5 * torch.randn(1, *shape[1:], generator=draw))
    keys = means + widths * torch.randn(shape, generator=draw)
    values = widths * torch.randn(shape, generator=draw)
    return keys.to(dtype), values.to(dtype)


def _timed(codec: Codec, keys: Tensor, values: Tensor, deadline: float) -> _Timing:
    """Medians of a few goes after one to warm up; of fewer past ``deadline``."""
    staging = memoryview(bytearray(codec.bound(keys.shape[0])))
    goes = [_once(codec, keys, values, staging)]
    while len(goes) <= REPEATS and time.monotonic() < deadline:
        goes.append(_once(codec, keys, values, staging))
    warm = goes[1:] or goes
    return _Timing(median(go.encode_s for go in warm), median(go.decode_s for go in warm), goes[0].nbytes)


def _once(codec: Codec, keys: Tensor, values: Tensor, staging: memoryview) -> _Timing:
    count = keys.shape[0]
    started = time.perf_counter()
    # As from the middle of a prompt: what is kept exactly at its ends must not count for every block.
    nbytes = codec.encode(keys.clone(), values.clone(), staging, before=LARGE_TOKENS, after=LARGE_TOKENS)
    _sign(staging[:nbytes], count, codec.name)
    encoded = time.perf_counter()
    _sign(staging[:nbytes], count, codec.name)
    for tensor in codec.decode(staging[:nbytes], count):
        tensor.clone(memory_format=torch.contiguous_format)
    return _Timing(encoded - started, time.perf_counter() - encoded, nbytes)


def _sign(data: memoryview, count: int, codec: str) -> bytes:
    return block_digest(data, request_id="speed", epoch=0, layout="", layer=0, start=0, count=count, codec=codec)


def _candidate(name: str, raw: list[int], timings: list[_Timing]) -> Candidate:
    def line(seconds: Callable[[_Timing], float]) -> Speed:
        """Through both sizes; all of it per byte where the larger one was not slower."""
        s0, s1 = (seconds(timing) for timing in timings)
        per_byte = (s1 - s0) / (raw[1] - raw[0]) if raw[1] > raw[0] else 0.0
        if per_byte <= 0.0:
            return Speed(0.0, raw[1] / max(s1, _LEAST_S))
        return Speed(max(0.0, s0 - per_byte * raw[0]), min(_FASTEST, 1 / per_byte))

    return Candidate(
        name, raw[1] / timings[1].nbytes, line(lambda timing: timing.encode_s), line(lambda timing: timing.decode_s),
        LOSS[name],
    )  # fmt: skip
