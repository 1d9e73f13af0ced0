"""The next token of every row on the device, as :mod:`engine.sampler` defines it, without sorting the vocabulary.

A row is one program. ``top_k`` and ``top_p`` are thresholds on the logit, found by bisecting over the bits of a float32
whose order is that of the numbers: at most 32 passes over a row that sits in the L2 cache, and none for rows that do
not ask. The draw is an inverse CDF over the kept tokens in the order of their ids, in float64 as the sampler's, so that
one seed gives one token wherever it is drawn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.specialisation import Specialisation

BLOCK = 2048  # at 4096, sixteen warps run out of registers
WARPS = 16

_LOWEST = tl.constexpr(-2139095041)  # the key of -inf
_NONE = tl.constexpr(2147483647)


@triton.jit
def _keys(logits):
    """Signed integers in the order of ``logits``; both zeros are one number."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _between(low, high):
    """The middle of two int32, rounded up; their sum might overflow (Warren, Hacker's Delight, 2-5)."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def _likeliest(logits_ptr, vocab, BLOCK: tl.constexpr):
    """The largest logit and the smallest id that has it."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    ids = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf"))
        ids = tl.where(logits > best, at, ids)
        best = tl.maximum(best, logits)
    top = tl.max(best, axis=0)
    return top, tl.min(tl.where(best == top, ids, _NONE), axis=0)


@triton.jit
def _kth_key(logits_ptr, vocab, keep, highest, BLOCK: tl.constexpr):
    """A key that ``keep`` tokens reach: the k-th largest, or one below it that no other token has."""
    low = tl.full((), _LOWEST, tl.int32)
    high = highest
    while low < high:
        middle = _between(low, high)
        reached = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf"))
            reached += ((_keys(logits) >= middle) & (at < vocab)).to(tl.int32)
        count = tl.sum(reached, axis=0)
        low = tl.where(count >= keep, middle, low)
        high = tl.where(count == keep, middle, tl.where(count > keep, high, middle - 1))
    return low


@triton.jit
def _weigh(logits_ptr, weights_ptr, vocab, top, temperature, threshold, BLOCK: tl.constexpr):
    """Writes each token's weight, the top's being 1 and 0 below ``threshold``. Returns their sum."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf"))
        weights = tl.exp((logits.to(tl.float64) - top.to(tl.float64)) / temperature)
        weights = tl.where((_keys(logits) >= threshold) & (at < vocab), weights, 0.0)
        tl.store(weights_ptr + at, weights, mask=at < vocab)
        total += weights
    return tl.sum(total, axis=0)


@triton.jit
def _nucleus_key(logits_ptr, weights_ptr, vocab, wanted, lowest, highest, BLOCK: tl.constexpr):
    """The largest key above which, itself included, at least ``wanted`` of the weight lies."""
    low = lowest
    high = highest
    while low < high:
        middle = _between(low, high)
        held = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            logits = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf"))
            weights = tl.load(weights_ptr + at, mask=at < vocab, other=0.0)
            held += tl.where(_keys(logits) >= middle, weights, 0.0)
        enough = tl.sum(held, axis=0) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _kept(logits_ptr, weights_ptr, at, vocab, threshold, floor):
    logits = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf"))
    weights = tl.load(weights_ptr + at, mask=at < vocab, other=0.0)
    return tl.where((_keys(logits) >= threshold) & (weights >= floor), weights, 0.0)


@triton.jit
def _walk(logits_ptr, weights_ptr, vocab, threshold, floor, uniform, BLOCK: tl.constexpr):
    """The first id at which the kept weight so far exceeds the fraction ``uniform`` of all."""
    total = tl.zeros((), tl.float64)
    last = tl.zeros((), tl.int32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        weights = _kept(logits_ptr, weights_ptr, at, vocab, threshold, floor)
        total += tl.sum(weights, axis=0)
        last = tl.maximum(last, tl.max(tl.where(weights > 0.0, at, 0), axis=0))
    target = uniform * total
    before = tl.zeros((), tl.float64)
    token = tl.full((), _NONE, tl.int32)
    start = tl.zeros((), tl.int32)
    while (start < vocab) & (token == _NONE):
        at = start + tl.arange(0, BLOCK)
        weights = _kept(logits_ptr, weights_ptr, at, vocab, threshold, floor)
        held = tl.sum(weights, axis=0)
        if before + held > target:
            passed = (before + tl.cumsum(weights, axis=0) > target) & (weights > 0.0)
            token = tl.min(tl.where(passed, at, _NONE), axis=0)
        before += held
        start += BLOCK
    return tl.minimum(token, last)  # rounding may leave the target at the total: then it is the last one kept


@triton.jit(do_not_specialize=["rows"])  # one compilation serves every batch
def _choose(
    logits_ptr,  # [rows, vocab] float32
    controls_ptr,  # [5, rows] float64: temperature, top_k, top_p, min_p, uniform
    weights_ptr,  # [rows, vocab] float64, scratch
    tokens_ptr,  # [rows] int64
    rows,
    vocab,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * vocab
    weights_ptr += row.to(tl.int64) * vocab
    temperature = tl.load(controls_ptr + row)
    keep = tl.load(controls_ptr + rows + row).to(tl.int32)
    top_p = tl.load(controls_ptr + 2 * rows + row)
    top, token = _likeliest(logits_ptr, vocab, BLOCK)
    if temperature > 0.0:
        highest = _keys(top)
        threshold = tl.full((), _LOWEST, tl.int32)
        if (keep > 0) & (keep < vocab):
            threshold = _kth_key(logits_ptr, vocab, keep, highest, BLOCK)
        total = _weigh(logits_ptr, weights_ptr, vocab, top, temperature, threshold, BLOCK)
        tl.debug_barrier()  # a thread reads weights that another one wrote
        if top_p < 1.0:
            threshold = _nucleus_key(logits_ptr, weights_ptr, vocab, top_p * total, threshold, highest, BLOCK)
        floor = tl.load(controls_ptr + 3 * rows + row)
        uniform = tl.load(controls_ptr + 4 * rows + row)
        token = _walk(logits_ptr, weights_ptr, vocab, threshold, floor, uniform, BLOCK)
    tl.store(tokens_ptr + row, token.to(tl.int64))


def choose(logits: Tensor, controls: Tensor, block: int = BLOCK) -> Tensor:
    """One token a row [rows], int64. logits: [rows, vocab] float32.

    controls: [5, rows] float64 of :func:`engine.sampler.controls`, on the same device. Temperature 0 is greedy and
    takes the smallest id of equal logits.
    """
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        weights = torch.empty(rows, vocab, dtype=torch.float64, device=logits.device)
        logits = logits.contiguous()
        _choose[(rows,)](logits, controls, weights, tokens, rows, vocab, BLOCK=block, num_warps=WARPS)
    return tokens


_SIGNATURE = {
    "logits_ptr": "*fp32",
    "controls_ptr": "*fp64",
    "weights_ptr": "*fp64",
    "tokens_ptr": "*i64",
    "rows": "i32",
    "vocab": "i32",
    "BLOCK": "constexpr",
}
_POINTERS = frozenset({"logits_ptr", "controls_ptr", "weights_ptr", "tokens_ptr"})
SPECIALISATIONS = (
    Specialisation("choose", _choose, _SIGNATURE, {"BLOCK": BLOCK}, WARPS, 1, _POINTERS),
    Specialisation(
        "choose[aligned vocabulary]", _choose, _SIGNATURE, {"BLOCK": BLOCK}, WARPS, 1, _POINTERS | {"vocab"}
    ),
)
