"""The decoder's operations by the compiled kernels: float32 activations over float32 or bf16 weights and pages.

A bf16 weight is a float32 whose lower half is zero, so products of bf16 weights equal those of the same weights kept
in float32, at half the memory traffic: what a decode step is made of.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention import Span
from engine.native import build
from engine.native.library import Library

log = logging.getLogger(__name__)

HEAD_DIM_MULTIPLE = 8  # floats that a kernel takes of a head at once


@dataclass(frozen=True, slots=True)
class NativePlan:
    """A step's sequences as the kernels read them. ``numbers``: first row, start, count and where its table begins,
    for each sequence; then their block tables."""

    numbers: array[int]
    address: int  # of numbers
    spans: int
    decodes: int  # the first of them
    page_tokens: int
    written: Tensor  # [rows] where in the cache each row's own KV goes
    written_address: int


class PackedLinear:
    """A weight matrix in panels of columns, which one pass reads in the order of memory."""

    __slots__ = ("_arguments", "_bias", "_call", "_outputs", "_panels", "_threads")

    def __init__(self, library: Library, weight: Tensor, bias: Tensor | None, threads: int) -> None:
        outputs, inputs = weight.shape
        weight = weight.contiguous()
        columns = -(-outputs // library.panel) * library.panel
        halves = weight.dtype == torch.bfloat16
        pack, self._call = (
            (library.pack_bf16, library.linear_bf16) if halves else (library.pack_f32, library.linear_f32)
        )
        self._panels = torch.empty(columns * inputs, dtype=weight.dtype)
        self._bias = None if bias is None else bias.float().contiguous()
        pack(weight.data_ptr(), self._panels.data_ptr(), inputs, outputs, threads)
        self._outputs = outputs
        self._threads = threads
        self._arguments = self._panels.data_ptr(), 0 if self._bias is None else self._bias.data_ptr(), inputs

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, inputs] in float32. Returns [rows, outputs]."""
        x = x.contiguous()
        panels, bias, inputs = self._arguments
        rows = x.shape[0]
        y = torch.empty(rows, self._outputs)
        self._call(x.data_ptr(), panels, bias, y.data_ptr(), rows, inputs, self._outputs, self._threads)
        return y


class NativeOps:
    """:class:`engine.ops.Ops` on CPU in float32. KV may be float32 or bfloat16."""

    def __init__(self, library: Library, threads: int) -> None:
        self._library, self._threads = library, threads

    def pack(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        kept = weight if weight.dtype == torch.bfloat16 else weight.float()
        return PackedLinear(self._library, kept, bias, self._threads)

    def norm(self, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        hidden = hidden.contiguous()
        return self._norm(hidden, 0, weight, eps)

    def add_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        hidden, delta = hidden.contiguous(), delta.contiguous()
        return hidden, self._norm(hidden, delta.data_ptr(), weight, eps)

    def _norm(self, hidden: Tensor, delta: int, weight: Tensor, eps: float) -> Tensor:
        normed = torch.empty_like(hidden)
        width = weight.shape[0]
        rows = hidden.numel() // width
        self._library.norm(
            hidden.data_ptr(), delta, weight.data_ptr(), normed.data_ptr(), rows, width, eps, self._threads
        )
        return normed

    def rope_write(self, plan: NativePlan, qkv: Tensor, cos: Tensor, sin: Tensor, layer: Tensor) -> None:
        rows, all_heads, head_dim = qkv.shape
        kv = layer.shape[1]
        call = self._library.rope_write_f32 if layer.dtype == torch.float32 else self._library.rope_write_bf16
        call(
            qkv.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            plan.written_address,
            layer.data_ptr(),
            rows,
            all_heads - kv,
            kv // 2,
            head_dim,
            self._threads,
        )

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        y = torch.empty(rows, width)
        self._library.silu_mul(gate_up.data_ptr(), y.data_ptr(), rows, width, self._threads)
        return y

    def plan(self, decodes: Sequence[Span], chunks: Sequence[Span], page_tokens: int) -> NativePlan:
        numbers, tables = array("q"), array("q")
        spans, first = len(decodes) + len(chunks), 0
        for span in (*decodes, *chunks):
            if span.start + span.count > len(span.pages) * page_tokens:
                raise IndexError(f"{span.start + span.count} tokens in {len(span.pages)} pages of {page_tokens}")
            numbers.extend((first, span.start, span.count, 4 * spans + len(tables)))
            tables.extend(span.pages)
            first += span.count
        numbers.extend(tables)
        address, _ = numbers.buffer_info()
        written = torch.empty(first, dtype=torch.int64)
        self._library.slots(address, spans, page_tokens, written.data_ptr())
        return NativePlan(numbers, address, spans, len(decodes), page_tokens, written, written.data_ptr())

    def attend(self, plan: NativePlan, qkv: Tensor, layer: Tensor, window: int | None) -> Tensor:
        rows, all_heads, head_dim = qkv.shape
        kv = layer.shape[1]
        heads = all_heads - kv
        out = torch.empty(rows, heads * head_dim)
        call = self._library.attend_f32 if layer.dtype == torch.float32 else self._library.attend_bf16
        call(
            plan.address,
            plan.spans,
            plan.decodes,
            plan.page_tokens,
            qkv.data_ptr(),
            layer.data_ptr(),
            out.data_ptr(),
            heads,
            kv // 2,
            head_dim,
            window or 0,
            self._threads,
        )
        return out


def native_ops(head_dim: int, threads: int) -> NativeOps | None:
    """The compiled operations for a model with heads of ``head_dim``; None, with a warning that says why, where they
    cannot be had."""
    if head_dim % HEAD_DIM_MULTIPLE:
        log.warning("heads of %d are no multiple of %d: plain torch computes instead", head_dim, HEAD_DIM_MULTIPLE)
        return None
    try:
        return NativeOps(Library(build.library()), threads)
    except (build.BuildError, OSError) as error:
        log.warning("the CPU kernels are not there, plain torch computes at about a third of the speed: %s", error)
        return None
