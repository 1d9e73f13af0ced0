"""Kernels run interpreted on the CPU, and really where there is a GPU (tests/conftest.py chooses)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
