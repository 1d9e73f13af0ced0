"""How long one kernel runs on one accelerator: from the hardware's numbers alone, or from measured tables.

With F the multiply-add FLOPs (two per multiply-add), V the bytes that must cross the memory bus, f and v what the
hardware reaches of its peaks, and l the least time of a launch, a kernel takes

    T = l + max(T_compute, T_memory)      T_compute = F / f      T_memory = V / v

and an all-reduce of S bytes over p ranks T_comms = l_link + 2 (p-1)/p S / link.

    kernel               F                      V, in values
    GEMM                 2 m n k                m n + n k + m k
    prefill attention    2 B h d n (n + 1)      B n d (2 h + 2 g)
    decode attention     4 B h d c              2 B c g d

B sequences, n tokens each, c context, h heads, g KV heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from placement.grids import Estimate, Flags, Floats
from placement.hardware import ATTENTION_EFFICIENCY, GEMM_EFFICIENCY, Hardware
from placement.model_shape import DTYPE_BYTES
from placement.tables import FP8_ROWS, RAGGED, Tables


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads of one tensor-parallel rank."""

    query: int
    kv: int
    size: int

    @property
    def kv_values(self) -> int:
        """Values of K and V of one token."""
        return 2 * self.kv * self.size


class Kernels(Protocol):
    """Seconds of one launch. Arrays broadcast to [points]; scalars are one shape's own."""

    def gemm(self, m: Floats, n: int, k: int) -> Estimate:
        """[m, k] times [k, n]."""
        ...

    def prefill_attention(self, batch: Floats, tokens: Floats, heads: Heads) -> Estimate:
        """Causal attention of ``batch`` fresh prompts of ``tokens`` each."""
        ...

    def decode_attention(self, batch: Floats, context: Floats, heads: Heads) -> Estimate:
        """One query of each of ``batch`` sequences over ``context`` tokens."""
        ...

    def all_reduce(self, nbytes: Floats, ranks: int) -> Estimate: ...


@dataclass(frozen=True, slots=True)
class RooflineKernels:
    """The formulas above with the hardware's numbers. Nothing is measured, so nothing counts as extrapolated."""

    hardware: Hardware
    dtype: str = "bfloat16"

    @property
    def peak(self) -> float:
        """FLOP/s; float16 runs on the same units as bfloat16."""
        return self.hardware.peak_flops("bfloat16" if self.dtype == "float16" else self.dtype)

    @property
    def value_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    def gemm(self, m: Floats, n: int, k: int) -> Estimate:
        flops, values = gemm_work(m, n, k)
        return self._bound(flops / GEMM_EFFICIENCY, values)

    def prefill_attention(self, batch: Floats, tokens: Floats, heads: Heads) -> Estimate:
        values = batch * tokens * heads.size * (2 * heads.query + 2 * heads.kv)
        return self._bound(prefill_flops(batch, tokens, heads) / ATTENTION_EFFICIENCY, values)

    def decode_attention(self, batch: Floats, context: Floats, heads: Heads) -> Estimate:
        flops = 4.0 * batch * context * heads.query * heads.size
        return self._bound(flops / ATTENTION_EFFICIENCY, batch * context * heads.kv_values)

    def all_reduce(self, nbytes: Floats, ranks: int) -> Estimate:
        if ranks == 1:
            return _sure(np.zeros_like(nbytes))
        moved = 2 * (ranks - 1) / ranks * nbytes
        return _sure(self.hardware.link_latency_s + moved / self.hardware.link_bytes_per_s(ranks))

    def _bound(self, flops: Floats, values: Floats) -> Estimate:
        memory_s = values * self.value_bytes / self.hardware.stream_bytes_per_s
        return _sure(self.hardware.launch_s + np.maximum(flops / self.peak, memory_s))


@dataclass(frozen=True, slots=True)
class TableKernels:
    """Measured tables, with the formulas where a table is missing and as a floor that no estimate goes below.

    Prefill attention is taken from the rows with as many KV heads as query heads. On the H200 table the rows of
    grouped-query attention, with the same FLOPs, are up to two orders of magnitude faster than the tensor cores' peak
    allows (docs/cost-model.md): they cannot be what they say.
    """

    tables: Tables
    roofline: RooflineKernels

    def gemm(self, m: Floats, n: int, k: int) -> Estimate:
        name = f"gemm.{_table_dtype(self.roofline.dtype)}"
        grid, ragged = (self.tables.grids.get(table) for table in (name, f"{name}.{RAGGED}"))
        if grid is None:
            return _unsure(self.roofline.gemm(m, n, k))
        flops, _ = gemm_work(m, n, k)
        points = _points(m, float(n), float(k))
        estimate = grid.estimate(points)
        if ragged is not None:
            estimate = _choose(points[:, 0] % FP8_ROWS != 0, ragged.estimate(points), estimate)
        return self._floor(estimate, flops)

    def prefill_attention(self, batch: Floats, tokens: Floats, heads: Heads) -> Estimate:
        grid = self.tables.grids.get(f"prefill.{_table_dtype(self.roofline.dtype)}.{heads.size}")
        if grid is None:
            return _unsure(self.roofline.prefill_attention(batch, tokens, heads))
        count = float(heads.query)
        return self._floor(grid.estimate(_points(batch, tokens, count, count)), prefill_flops(batch, tokens, heads))

    def decode_attention(self, batch: Floats, context: Floats, heads: Heads) -> Estimate:
        """More KV heads than the table has: as many times more sequences with as many times fewer heads, which read
        the same bytes in the same number of blocks."""
        grid = self.tables.grids.get(f"decode.{_table_dtype(self.roofline.dtype)}.{heads.size}")
        if grid is None:
            return _unsure(self.roofline.decode_attention(batch, context, heads))
        fold = max(1.0, heads.kv / float(grid.nodes[3][-1]))
        estimate = grid.estimate(_points(batch * fold, context, heads.query / fold, heads.kv / fold))
        nbytes = batch * context * heads.kv_values * self.roofline.value_bytes
        floor = np.where(estimate.extrapolated, nbytes / self.roofline.hardware.memory_bytes_per_s, 0.0)
        return Estimate(np.maximum(estimate.seconds, floor), estimate.extrapolated | (fold > 1))

    def all_reduce(self, nbytes: Floats, ranks: int) -> Estimate:
        """The faster of NCCL and the custom kernel at each size, as vLLM chooses; beyond their ranks the formula."""
        grids = [
            self.tables.grids[name]
            for name in ("all_reduce.nccl", "all_reduce.vllm_graph")
            if name in self.tables.grids
        ]
        grids = [grid for grid in grids if ranks in grid.nodes[1]]
        if ranks == 1 or not grids:
            formula = self.roofline.all_reduce(nbytes, ranks)
            return formula if ranks == 1 else _unsure(formula)
        estimates = [grid.estimate(_points(nbytes, float(ranks))) for grid in grids]
        unsure = np.stack([estimate.extrapolated for estimate in estimates])
        seconds = np.stack([estimate.seconds for estimate in estimates])
        seconds = np.where(unsure & ~unsure.all(axis=0), np.inf, seconds)  # measured before extrapolated
        return Estimate(seconds.min(axis=0), np.logical_and.reduce(unsure))

    def _floor(self, estimate: Estimate, flops: Floats) -> Estimate:
        return Estimate(np.maximum(estimate.seconds, flops / self.roofline.peak), estimate.extrapolated)


def gemm_work(m: Floats, n: int, k: int) -> tuple[Floats, Floats]:
    """FLOPs and values moved."""
    return 2.0 * m * n * k, m * n + float(n) * k + m * k


def prefill_flops(batch: Floats, tokens: Floats, heads: Heads) -> Floats:
    return 2.0 * batch * heads.query * heads.size * tokens * (tokens + 1)


def _table_dtype(dtype: str) -> str:
    return "bfloat16" if dtype == "float16" else dtype


def _points(*columns: Floats | float) -> Floats:
    return np.stack(np.broadcast_arrays(*(np.atleast_1d(np.asarray(c, dtype=np.float64)) for c in columns)), axis=1)


def _choose(first: Flags, one: Estimate, other: Estimate) -> Estimate:
    return Estimate(np.where(first, one.seconds, other.seconds), np.where(first, one.extrapolated, other.extrapolated))


def _sure(seconds: Floats) -> Estimate:
    nothing: npt.NDArray[np.bool_] = np.zeros(np.shape(seconds), dtype=np.bool_)
    return Estimate(seconds, nothing)


def _unsure(estimate: Estimate) -> Estimate:
    return Estimate(estimate.seconds, np.ones_like(estimate.extrapolated))
