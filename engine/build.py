"""From a model folder and a pool's configuration to a running engine's parts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from baton.config import PoolConfig
from baton.errors import ConfigError
from engine import hub, weights
from engine.cache import TORCH_DTYPES
from engine.comm import Comm
from engine.devices import choose_device
from engine.engine import Engine, LayerObserver
from engine.model import Model
from engine.native.ops import native_ops
from engine.ops import Ops, TorchOps
from engine.ranks import Ranks
from engine.spec import ModelSpec
from engine.threads import compute_here


def start_ranks(
    folder: Path, dtype: str, threads: int, pool: PoolConfig, *, max_context: int | None = None
) -> Ranks | None:
    """The other ranks of one of ``pool``'s workers, loading by now; None when it has only one.

    Raises :class:`ConfigError` when they cannot share the model, or this machine has GPUs but not one for each.
    """
    if pool.tensor_parallel == 1:
        return None
    return Ranks(
        folder,
        ranks=pool.tensor_parallel,
        dtype=dtype,
        threads=threads,
        max_context=max_context,
        pages=pool.kv_tokens // pool.page_tokens,
        page_tokens=pool.page_tokens,
    )


def load_model(
    folder: Path, dtype: str, threads: int, comm: Comm | None = None, *, max_context: int | None = None
) -> Model:
    """The model in ``folder``, or the slice of ``comm``'s rank on its device; on a GPU when there is one.

    ``threads`` of torch on CPU, for the calling thread; 0 keeps torch's own choice. ``max_context``: tokens of the
    longest sequence that will come, if that is less than the model's own.
    """
    if threads:
        compute_here(min(threads, os.cpu_count() or threads))
    device = choose_device() if comm is None else comm.device
    spec, compute = ModelSpec.from_folder(folder), weights.choose_dtype(dtype, device)
    storage = weights.storage_dtype(folder, TORCH_DTYPES[compute])
    model = Model(
        spec,
        name=hub.describe(folder),
        dtype=compute,
        device=device,
        storage=storage,
        ops=choose_ops(TORCH_DTYPES[compute], device, spec.head_dim),
        comm=comm,
        max_context=max_context,
    )
    weights.load(model, folder, weights.LoadLog())
    model.pack()
    return model


def choose_ops(dtype: torch.dtype, device: torch.device, head_dim: int) -> Ops[Any]:
    """The fastest operations there are for this device, in ``dtype`` and with as many threads as torch has now."""
    if device.type == "cuda":
        from engine.cuda_ops import CudaOps  # Triton, which only CUDA needs

        return CudaOps(dtype, device)
    native = native_ops(head_dim, torch.get_num_threads()) if dtype == torch.float32 else None
    return native or TorchOps(dtype, device)


def build_engine(
    model: Model,
    pool: PoolConfig,
    max_context: int,
    observer: LayerObserver | None = None,
    ranks: Ranks | None = None,
) -> Engine:
    """An engine with ``pool``'s pages and limits. ``max_context`` tokens of one sequence must fit its pages.

    ``ranks`` of :func:`start_ranks` are waited for, and belong to the engine from then on.
    """
    if pool.kv_tokens < min(max_context, model.spec.max_context):
        raise ConfigError(f"{pool.kv_tokens} cannot hold one context of {max_context} tokens", field="kv_tokens")
    if ranks is not None:
        ranks.await_ready()
    engine = Engine(
        model,
        page_tokens=pool.page_tokens,
        pages=pool.kv_tokens // pool.page_tokens,
        step_tokens=pool.step_tokens,
        max_running=pool.max_running,
        max_waiting=pool.max_waiting,
        mixed_tokens=pool.mixed_tokens,
        gap_s=pool.gap_ms / 1e3,
        prefix_cache=pool.prefix_cache,
        observer=observer,
        ranks=ranks,
    )
    if model.device.type == "cuda":
        engine.warm_up(pool.max_running if observer is None else 0)  # who has an observer decodes nothing
    return engine
