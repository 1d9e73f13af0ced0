"""How ranks meet, by what a machine has."""

from __future__ import annotations

import pytest
import torch

from baton.errors import ConfigError
from engine.devices import choose_device, choose_means, device_of, means_for


@pytest.mark.parametrize(
    ("ranks", "gpus", "machine", "means"),
    [
        (2, 0, "x86_64", "shared"),
        (64, 0, "AMD64", "shared"),
        (2, 0, "aarch64", "gloo"),
        (2, 2, "x86_64", "nccl"),
        (2, 8, "aarch64", "nccl"),
        (1, 1, "x86_64", "nccl"),
    ],
)
def test_what_the_machine_has_decides(ranks: int, gpus: int, machine: str, means: str) -> None:
    assert means_for(ranks, gpus, machine) == means


def test_too_few_gpus_are_named_with_the_counts() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel: 4 ranks need a GPU each, 3 visible"):
        means_for(4, 3, "x86_64")


def test_each_rank_has_its_own_gpu_and_shares_the_cpu() -> None:
    assert [device_of("nccl", rank) for rank in range(2)] == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert device_of("gloo", 1) == device_of("shared", 1) == torch.device("cpu")


def test_this_machine() -> None:
    if torch.cuda.is_available():
        assert choose_device(0) == torch.device("cuda:0")
        assert choose_means(1) == "nccl"
    else:
        assert choose_device(3) == torch.device("cpu")
        assert choose_means(2) in ("shared", "gloo")
