"""How fast this machine's codecs are: measured at start-up, in bounded time, on KV-like data of the layout's shape.

What is timed is what a worker does with a block: read it from pages, encode and sign; check, decode and write to pages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from baton.config_handoff import LOSS
from baton.layout import KVLayout
from kvtransfer.chooser import Candidate, Speed
from kvtransfer.codecs import Codec, make_codec
from kvtransfer.codecs.paged import PagedCodec
from kvtransfer.pages import Accelerator, Rows, lane_of, paged_codecs
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


_Read: TypeAlias = Callable[[int], tuple[Tensor, Tensor]]  # K and V of the first so many tokens
_Write: TypeAlias = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class _Trial:
    """One codec at both ends: from KV in place to bytes in ``staging``, and from there to KV in place. As from the
    middle of a prompt: what is kept exactly at its ends must not count for every block."""

    name: str
    staging: memoryview
    encode: Callable[[int], int]  # of the first so many tokens; returns the block's size
    decode: Callable[[memoryview, int], None]


def measure_codecs(
    layout: KVLayout, names: Sequence[str], *, budget_s: float = BUDGET_S, accelerator: Accelerator | None = None
) -> tuple[Candidate, ...]:
    """Ratio and speeds of ``names``, in order, for as many as ``budget_s`` allows; the first one always. On the
    ``accelerator`` those that it has, whose kernels are compiled before, which the budget does not bound.

    CPU-bound: call it from a thread of its own.
    """
    large = min(LARGE_TOKENS, block_tokens(layout))
    sizes = (max(1, large // SMALL_SHARE), large)
    with lane_of(accelerator):
        trials = _trials(layout, names, large, accelerator)
        if accelerator is not None:
            for trial in trials:
                _once(trial, large)
        deadline = time.monotonic() + budget_s
        found: list[Candidate] = []
        for trial in trials:
            if found and time.monotonic() >= deadline:
                left = ", ".join(names[len(found) :])
                log.warning("no time to measure codecs %s; they are not chosen", left)
                break
            timings = [_timed(trial, count, deadline) for count in sizes]
            found.append(_candidate(trial.name, [count * layout.layer_token_bytes for count in sizes], timings))
    return tuple(found)


def _trials(layout: KVLayout, names: Sequence[str], tokens: int, accelerator: Accelerator | None) -> list[_Trial]:
    device = torch.device("cpu") if accelerator is None else accelerator.device
    rows = Rows(torch.cat(_kv_like(layout, tokens), dim=1).to(device), torch.arange(tokens, device=device))
    paged = paged_codecs(accelerator, names, layout)
    return [
        _in_pages(paged[name], rows) if name in paged else _on_host(make_codec(name, layout), tokens, *_over(rows))
        for name in names
    ]


def _over(rows: Rows) -> tuple[_Read, _Write]:
    """From and to the pages, for codecs that do not know them."""

    def write(keys: Tensor, values: Tensor) -> None:
        Rows(rows.layer, rows.slots[: keys.shape[0]]).scatter(keys, values)

    return lambda count: Rows(rows.layer, rows.slots[:count]).gather(), write


def _on_host(codec: Codec, tokens: int, read: _Read, write: _Write) -> _Trial:
    staging = memoryview(bytearray(codec.bound(tokens)))

    def encode(count: int) -> int:
        return codec.encode(*read(count), staging, before=LARGE_TOKENS, after=LARGE_TOKENS)

    def decode(data: memoryview, count: int) -> None:
        write(*codec.decode(data, count))

    return _Trial(codec.name, staging, encode, decode)


def _in_pages(codec: PagedCodec, rows: Rows) -> _Trial:
    pinned = torch.empty(codec.bound(len(rows.slots)), dtype=torch.uint8, pin_memory=rows.layer.is_cuda)
    staging = pinned.numpy().data

    def encode(count: int) -> int:
        return codec.encode(rows.layer, rows.slots[:count], staging, before=LARGE_TOKENS, after=LARGE_TOKENS)

    def decode(data: memoryview, count: int) -> None:
        codec.decode(data, rows.layer, rows.slots[:count])

    return _Trial(codec.name, staging, encode, decode)


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


def _timed(trial: _Trial, count: int, deadline: float) -> _Timing:
    """The best of a few goes after one to warm up, of fewer past ``deadline``: others on the machine make goes slower,
    and nothing makes them faster; how much slower blocks really are is seen as they are encoded."""
    goes = [_once(trial, count)]
    while len(goes) <= REPEATS and time.monotonic() < deadline:
        goes.append(_once(trial, count))
    warm = goes[1:] or goes
    return _Timing(min(go.encode_s for go in warm), min(go.decode_s for go in warm), goes[0].nbytes)


def _once(trial: _Trial, count: int) -> _Timing:
    started = time.perf_counter()
    data = trial.staging[: trial.encode(count)]
    _sign(data, count, trial.name)
    encoded = time.perf_counter()
    _sign(data, count, trial.name)
    trial.decode(data, count)
    return _Timing(encoded - started, time.perf_counter() - encoded, len(data))


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
