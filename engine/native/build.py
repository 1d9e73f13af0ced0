"""Compiles the kernels for this CPU once and keeps the library; later starts and other workers find it there."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from baton import native
from baton.native import BuildError

log = logging.getLogger(__name__)

__all__ = ["BuildError", "library"]

SOURCE = Path(__file__).with_name("kernels.cpp")
# No -ffast-math: it would let the compiler cancel the rounding in ``exponential``. Contraction to FMA is on by default.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")


def library(cache: Path = native.CACHE, compilers: tuple[str, ...] = native.COMPILERS) -> Path:
    """The compiled kernels in ``cache``, built now if need be. Raises :class:`BuildError`."""
    openmp = _torch_openmp()
    if openmp is None and torch.get_num_threads() > 1:
        log.warning(
            "torch brought no libgomp along: the CPU kernels run on one thread each, not %d", torch.get_num_threads()
        )
    threads = () if openmp is None else ("-fopenmp",)
    # Linked without -fopenmp, which would add the system's runtime: threads belong to torch's, or there are none.
    runtime = () if openmp is None else (str(openmp), f"-Wl,-rpath,{openmp.parent}")
    return native.library(SOURCE, (*FLAGS, *threads), runtime, cache=cache, compilers=compilers)


def _torch_openmp() -> Path | None:
    """The OpenMP runtime that torch brought along, so that one pool of threads serves both. None without one."""
    package = Path(torch.__file__).parent
    for folder in (package / "lib", package.parent / "torch.libs"):
        for found in sorted(folder.glob("libgomp*.so*")):
            return found
    return None
