"""One replica of a transformer on GPUs: from kernel times to step times.

A step computes N = sum(count) + B tokens: prefill chunks, and B decodes with C = sum(contexts). On p tensor-parallel
ranks and s pipeline stages, with L layers, H hidden and bytes e per value:

    T_step   = T_host + L (T_linear(N) + T_prefill + T_decode(B, C)) + T_head(B + chunks) + (s - 1) T_send(N)
    T_linear = GEMM(N; Q,K,V) + GEMM(N; output) + GEMM(N; MLP in) + GEMM(N; MLP out) + T_elementwise(N)
               + 2 all_reduce(N H e; p)                                 T_comms, not overlapped
    T_send   = l_link + N H e / link

Each kernel carries its own T_compute against T_memory (:mod:`placement.kernels`).

Prefill attention of a prompt of n tokens takes w(n) where the accelerator is full and u(n) >= w(n) alone. A chunk of
tokens [a, z) is what its end adds, w(z) - w(a): chunks then sum to their prompt. Several chunks share one launch, so

    T_prefill = max( max_i u(z_i) - u(a_i) + u(1),   u(1) + sum_i w(z_i) - w(a_i),   sum_i z_i V / v )

the slowest alone, all together, or reading the KV of all of them. Decode attention is read off at B contexts of C/B:
it is bound by the C tokens' KV, so that the sum says nearly all. It rises in B at one mean and in C at one B; a decode
that is much shorter than the mean can make a step cheaper, by a few percent, because few long contexts fill an
accelerator worse than many short ones. Everything is tabulated once per replica, so a step costs a few list look-ups;
between look-up nodes (octaves) the interpolation is linear, as T_memory is.
"""

from __future__ import annotations

import copy
from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np

from baton.errors import ConfigError
from placement.grids import Estimate, Floats, rising
from placement.handoff_cost import HandoffCost
from placement.hardware import Hardware
from placement.kernels import Heads, Kernels, RooflineKernels, TableKernels
from placement.model_shape import ModelShape
from placement.tables import Tables

HOST_S = 1e-3  # scheduling, sampling and launches that CUDA graphs do not hide: an assumption, not a measurement
STEP_TOKENS = 16384
CONTEXT_TOKENS = 131072
BATCH_OCTAVES = 12
# Norms, rotary positions, activation and cache write: kernels per layer, and how often they read or write one value
# per token. Launches inside a CUDA graph.
_ELEMENTWISE_KERNELS = 5
_ELEMENTWISE_HIDDEN = 8  # two residual additions with norm: two reads and two writes each


def replica(
    shape: ModelShape,
    hardware: Hardware,
    tables: Tables | None = None,
    *,
    tp: int = 1,
    pp: int = 1,
    handoff: HandoffCost | None = None,
    host_s: float = HOST_S,
) -> GpuReplica:
    """The cost model of ``shape`` on ``tp * pp`` accelerators. Without ``handoff``: raw KV over the node's network.

    Raises :class:`ConfigError` when the heads or layers do not split that way.
    """
    if not shape.allows(tp, pp):
        raise ConfigError(f"{shape.name} does not split over {tp} ranks and {pp} stages", field="plan.parallelism")
    formulas = RooflineKernels(hardware, shape.dtype)
    kernels: Kernels = formulas if tables is None else TableKernels(tables, formulas)
    if handoff is None:
        wire = hardware.inter_node_bytes_per_s * tp  # every rank sends its own heads over its own port
        handoff = HandoffCost(shape.kv_token_bytes, shape.layers, wire, latency_s=hardware.link_latency_s)
    return GpuReplica(shape, hardware, kernels, tp=tp, pp=pp, handoff=handoff, host_s=host_s)


class GpuReplica:
    """A :class:`placement.cost.CostModel`. ``extrapolations`` counts by reason what no measured cell enclosed."""

    def __init__(
        self,
        shape: ModelShape,
        hardware: Hardware,
        kernels: Kernels,
        *,
        tp: int,
        pp: int,
        handoff: HandoffCost,
        host_s: float,
    ) -> None:
        self.shape, self.hardware, self.tp, self.pp, self.handoff = shape, hardware, tp, pp, handoff
        self.extrapolations: Counter[str] = Counter()
        self._host_s = host_s
        self._heads = Heads(shape.heads // tp, max(1, shape.kv_heads // tp), shape.head_dim)
        self._tokens_s = self._tabulate_tokens(kernels)
        self._tokens_slope_s = self._tokens_s[-1] - self._tokens_s[-2]
        self._head_s = self._tabulate_head(kernels)
        self._full_s, self._alone_s, self._prefill_limit = self._tabulate_prefill(kernels)
        self._kv_read_s = shape.layers * self._heads.kv_values * shape.dtype_bytes / hardware.stream_bytes_per_s
        self._decode_s, self._decode_unsure = self._tabulate_decode(kernels)

    def with_handoff(self, handoff: HandoffCost) -> GpuReplica:
        """The same replica behind another link or codec; shares the tables, which take most of the time to make."""
        other = copy.copy(self)
        other.handoff, other.extrapolations = handoff, Counter(self.extrapolations)
        return other

    @property
    def gpus(self) -> int:
        return self.tp * self.pp

    def sum_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_sum: int) -> float:
        """Through all pipeline stages."""
        if not chunks:
            return self.decode_step_s(batch, context_sum)
        tokens = batch
        for _, count in chunks:
            tokens += count
        seconds = self._host_s + self._tokens(tokens) + self._prefill(chunks) + self._head(batch + len(chunks))
        return seconds + self._decode(batch, context_sum) if batch else seconds

    def decode_step_s(self, batch: int, context_sum: int) -> float:
        if not batch:
            return 0.0
        return self._host_s + self._tokens(batch) + self._decode(batch, context_sum) + self._head(batch)

    def transfer_s(self, tokens: int) -> float:
        return self.handoff.serial_s(tokens)

    def exposed_transfer_s(self, tokens: int) -> float:
        return self.handoff.exposed_s(tokens, self.sum_s(((0, tokens),), 0, 0)) if tokens > 0 else 0.0

    def kv_tokens(self) -> int:
        """What memory leaves beside weights, communicators and the reserve; 0 when the model does not fit."""
        ranks = self.hardware.collective_bytes
        communicator = max((size for count, size in ranks.items() if count <= self.tp), default=0)
        used = self.shape.weight_bytes / self.gpus + self.hardware.reserved_bytes + communicator
        per_token = self.shape.rank_kv_token_bytes(self.tp) / self.pp
        return max(0, int((self.hardware.memory_bytes - used) / per_token))

    # One step's terms, all layers together.

    def _tokens(self, tokens: int) -> float:
        table = self._tokens_s
        if tokens < len(table):
            return table[tokens]
        self.extrapolations["more tokens in a step than tabulated"] += 1
        return table[-1] + (tokens - len(table) + 1) * self._tokens_slope_s

    def _head(self, rows: int) -> float:
        table = self._head_s
        return table[rows] if rows < len(table) else table[-1] * rows / (len(table) - 1)

    def _prefill(self, chunks: Sequence[tuple[int, int]]) -> float:
        full_s, alone_s = self._full_s, self._alone_s
        limit = len(full_s) - 1
        launch_s = alone_s[1]
        longest = together = 0.0
        ends = 0
        for start, count in chunks:
            end = start + count
            ends += end
            if end > self._prefill_limit:
                self.extrapolations["prefill attention over a longer context than measured"] += 1
            if end > limit:  # quadratic beyond the last entry
                added = full_s[limit] * (end * end - start * start) / (limit * limit)
                alone = added
            else:
                added = full_s[end] - full_s[start]
                alone = alone_s[end] - alone_s[start]
            together += added
            longest = max(longest, alone)
        return max(launch_s + longest, launch_s + together, ends * self._kv_read_s)

    def _decode(self, batch: int, context_sum: int) -> float:
        """Bilinear inside the octaves of the batch and of the mean context."""
        mean = max(1.0, context_sum / batch)
        row = min(batch.bit_length() - 1, BATCH_OCTAVES - 1)
        column = min(int(mean).bit_length() - 1, len(self._decode_s[0]) - 2)
        if self._decode_unsure[row][column]:
            self.extrapolations["decode attention outside what was measured"] += 1
        down, right = batch / (1 << row) - 1, mean / (1 << column) - 1
        low, high = self._decode_s[row], self._decode_s[row + 1]
        at_low = low[column] + right * (low[column + 1] - low[column])
        at_high = high[column] + right * (high[column + 1] - high[column])
        return at_low + down * (at_high - at_low)

    # Tables, made once.

    def _tabulate_tokens(self, kernels: Kernels) -> array[float]:
        """T_linear of all layers and T_send, for 0 to STEP_TOKENS tokens."""
        shape, tp, heads = self.shape, self.tp, self._heads
        nodes = _counts(STEP_TOKENS)
        wide = shape.intermediate // tp
        matrices = (
            ((heads.query + 2 * heads.kv) * heads.size, shape.hidden),
            (shape.hidden, heads.query * heads.size),
            (wide * (2 if shape.gated else 1), shape.hidden),
            (shape.hidden, wide),
        )
        layer = np.zeros_like(nodes)
        for n, k in matrices:
            layer += rising(self._take(kernels.gemm(nodes, n, k), f"GEMM n={n} k={k}"))
        values = nodes * (_ELEMENTWISE_HIDDEN * shape.hidden + 3 * wide + 2 * (heads.query + 2 * heads.kv) * heads.size)
        streamed = values * shape.dtype_bytes / self.hardware.stream_bytes_per_s
        layer += _ELEMENTWISE_KERNELS * self.hardware.launch_s + streamed
        row_bytes = nodes * shape.hidden * shape.dtype_bytes
        layer += 2 * rising(self._take(kernels.all_reduce(row_bytes, tp), f"all-reduce over {tp} ranks"))
        send = self.hardware.link_latency_s + row_bytes / self.hardware.link_bytes_per_s(self.gpus)
        return _dense(nodes, shape.layers * layer + (self.pp - 1) * send, STEP_TOKENS)

    def _tabulate_head(self, kernels: Kernels) -> array[float]:
        """The vocabulary's GEMM and the gathering of its logits, for 0 to 4096 rows."""
        rows = 1 << BATCH_OCTAVES
        nodes, n = _counts(rows), -(-self.shape.vocab // self.tp)
        seconds = rising(self._take(kernels.gemm(nodes, n, self.shape.hidden), f"GEMM n={n} k={self.shape.hidden}"))
        if self.tp > 1:  # an all-gather moves half of what an all-reduce does
            logits = nodes * n * self.tp * self.shape.dtype_bytes
            seconds = seconds + rising(self._take(kernels.all_reduce(logits, self.tp), "all-gather of logits")) / 2
        return _dense(nodes, seconds, rows)

    def _tabulate_prefill(self, kernels: Kernels) -> tuple[array[float], array[float], int]:
        """w and u of all layers, for 0 to CONTEXT_TOKENS tokens, and the longest prompt measured."""
        nodes = np.unique(np.round(np.geomspace(1, CONTEXT_TOKENS, 120)))
        alone = kernels.prefill_attention(np.ones_like(nodes), nodes, self._heads)
        full = alone.seconds
        for batch in (4.0, 16.0, 64.0):
            shared = kernels.prefill_attention(np.full_like(nodes, batch), nodes, self._heads)
            usable = ~shared.extrapolated
            full = np.where(usable, np.minimum(full, shared.seconds / batch), full)
        measured = nodes[~alone.extrapolated]
        if measured.size == 0:
            self.extrapolations["prefill attention: no table"] += 1
        limit = int(measured[-1]) if measured.size else CONTEXT_TOKENS
        layers = self.shape.layers
        dense = [_dense(nodes, layers * rising(seconds), CONTEXT_TOKENS) for seconds in (full, alone.seconds)]
        return dense[0], dense[1], limit

    def _tabulate_decode(self, kernels: Kernels) -> tuple[list[list[float]], list[list[bool]]]:
        """[batch octave][context octave] of all layers, and which cells touch an estimate that is extrapolated."""
        batches, contexts = 2.0 ** np.arange(BATCH_OCTAVES + 1), 2.0 ** np.arange(CONTEXT_TOKENS.bit_length())
        batch, context = np.meshgrid(batches, contexts, indexing="ij")
        estimate = kernels.decode_attention(batch.ravel(), context.ravel(), self._heads)
        seconds = estimate.seconds.reshape(batch.shape)
        seconds = np.maximum.accumulate(np.maximum.accumulate(seconds, axis=0), axis=1)
        unsure = estimate.extrapolated.reshape(batch.shape)
        cells = unsure[:-1, :-1] | unsure[1:, :-1] | unsure[:-1, 1:] | unsure[1:, 1:]
        return (self.shape.layers * seconds).tolist(), cells.tolist()

    def _take(self, estimate: Estimate, what: str) -> Floats:
        if estimate.extrapolated.any():
            self.extrapolations[f"{what}: outside the table"] += 1
        return estimate.seconds


def _counts(most: int) -> Floats:
    """1, 2, 3, ... then in steps of 4 %."""
    return np.unique(np.round(np.concatenate([np.arange(1, 65), np.geomspace(64, most, 160)])))


def _dense(nodes: Floats, seconds: Floats, most: int) -> array[float]:
    """``seconds`` at ``nodes`` as one value for every count from 0 to ``most``; 0 for nothing."""
    values = np.interp(np.arange(most + 1), nodes, seconds)
    values[0] = 0.0
    return array("d", values.tolist())
