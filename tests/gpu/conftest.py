"""Tests that need a CUDA device: ``pytest -m gpu tests/gpu``. The kernels' own tests, in ``tests/unit/kernels``, run
interpreted elsewhere and really here: ``pytest tests/unit/kernels tests/gpu``."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")
