"""What this machine computes on, and how the ranks of a replica meet there. The one place that decides either."""

from __future__ import annotations

import platform
from typing import Literal, TypeAlias

import torch

from baton.errors import ConfigError

# shared: sums and KV in memory that all ranks map (CPU). gloo, nccl: sums over torch.distributed, and each rank's KV in
# memory of its own, on the CPU or on a GPU per rank.
Means: TypeAlias = Literal["shared", "gloo", "nccl"]

ORDERED_STORES = ("x86_64", "AMD64")  # engine.shared_reduce relies on it


def choose_device(rank: int = 0) -> torch.device:
    """``rank``'s GPU where torch sees any, else the CPU."""
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def choose_means(ranks: int) -> Means:
    """How ``ranks`` of one replica meet on this machine. Raises :class:`ConfigError` when it has too few GPUs."""
    return means_for(ranks, torch.cuda.device_count() if torch.cuda.is_available() else 0, platform.machine())


def means_for(ranks: int, gpus: int, machine: str) -> Means:
    """As :func:`choose_means`, for a machine with ``gpus`` visible and a processor called ``machine``. Pure."""
    if gpus == 0:
        return "shared" if machine in ORDERED_STORES else "gloo"
    if ranks > gpus:
        raise ConfigError(f"{ranks} ranks need a GPU each, {gpus} visible", field="tensor_parallel")
    return "nccl"


def device_of(means: Means, rank: int) -> torch.device:
    """What ``rank`` computes on."""
    return torch.device("cuda", rank) if means == "nccl" else torch.device("cpu")
