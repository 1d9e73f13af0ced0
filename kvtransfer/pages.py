"""KV that stays in its pages: a worker says where tokens lie, codecs read or write them there.

In host memory that saves a copy at either end. On an accelerator codecs' kernels do it: the sending side's thread and
the receiving side's each have a stream of their own, so that neither waits for the model's queue nor the model for
theirs; whoever says where tokens lie also makes the calling thread's stream wait for what must have happened to them.
Host memory at both ends of the copies is registered with the driver.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.errors import ConfigError
from baton.layout import KVLayout
from kvtransfer.arena import HostMemory
from kvtransfer.codecs.host_rows import HostRaw, gather_rows, scatter_rows
from kvtransfer.codecs.paged import Kernels, PagedCodec, make_paged, wait_for

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context of the process


@dataclass(frozen=True, slots=True)
class Rows:
    """Where some tokens of a layer lie, for the calling thread's stream.

    layer: [cache rows, 2 * kv_heads, head_dim], K heads first; slots: [count] int64, rows of it; on one device.
    """

    layer: Tensor
    slots: Tensor

    def gather(self) -> tuple[Tensor, Tensor]:
        """Copies of K and V, [count, kv_heads, head_dim] each, on the device: for codecs that do not know pages."""
        if self.layer.is_cpu:
            both = self.layer.new_empty(len(self.slots), *self.layer.shape[1:])
            gather_rows(self.layer, self.slots, both)
        else:
            both = self.layer.index_select(0, self.slots)
        keys, values = both.chunk(2, dim=1)
        return keys, values

    def scatter(self, keys: Tensor, values: Tensor) -> None:
        """Writes K and V of any dtype, from any device; they are in the pages when it returns."""
        if self.layer.is_cpu:
            for rows, half in zip(self.layer.chunk(2, dim=1), (keys, values), strict=True):
                scatter_rows(rows, self.slots, half.to(self.layer))
            return
        self.layer.index_copy_(0, self.slots, torch.cat((keys, values), dim=1).to(self.layer))
        wait_for(self.layer)


@dataclass(frozen=True, slots=True)
class Paged:
    """A request's pages: ``locate(layer, start, count)`` is called on the thread that lands, for every block."""

    locate: Callable[[int, int, int], Rows]


def paged_codecs(accelerator: Accelerator | None, names: Iterable[str], layout: KVLayout) -> dict[str, PagedCodec]:
    """Those of ``names`` that read and write pages themselves: on the accelerator, or in host memory."""
    if accelerator is not None:
        return accelerator.codecs(names, layout)
    return {name: HostRaw(layout) for name in names if name == HostRaw.name}


@dataclass(frozen=True, slots=True)
class Accelerator:
    """What a worker whose cache lies on ``device`` lends its sender or receiver.

    A ``device`` of the CPU is for kernels that are interpreted there.
    """

    kernels: Kernels
    device: torch.device

    def codecs(self, names: Iterable[str], layout: KVLayout) -> dict[str, PagedCodec]:
        """Those of ``names`` that there are kernels for. They belong to one thread."""
        made = {name: make_paged(name, layout, self.kernels) for name in names}
        return {name: codec for name, codec in made.items() if codec is not None}

    def lane(self) -> AbstractContextManager[object]:
        """A stream for the calling thread, until the context ends."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]

    def pin(self, memory: HostMemory, field: str) -> Callable[[], None]:
        """Registers ``memory`` with the driver; call the result before it goes.

        Raises :class:`ConfigError` naming ``field`` when the driver refuses.
        """
        if self.device.type != "cuda":
            return lambda: None
        driver = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(self.device):
            refusal = int(driver.cudaHostRegister(memory.address, memory.nbytes, _PORTABLE))
        if refusal:
            raise ConfigError(f"{memory.nbytes} bytes cannot be pinned: CUDA error {refusal}", field=field)
        return lambda: torch.cuda.check_error(int(driver.cudaHostUnregister(memory.address)))


def lane_of(accelerator: Accelerator | None) -> AbstractContextManager[object]:
    return contextlib.nullcontext() if accelerator is None else accelerator.lane()
