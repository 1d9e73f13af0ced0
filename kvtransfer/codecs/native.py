"""The C interface of codecs.cpp. Pointers are addresses, sizes are in values; ctypes lets go of the GIL meanwhile."""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

from baton import native

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("codecs.cpp")
# No contraction to fused multiply-adds: the compiled path must give its reference's bits.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS: dict[str, list[Any]] = {
    "quantise": [_POINTER, _INT, _INT, _LONG, _LONG, _INT, _INT, _INT, _FLOAT, _INT, _INT, *[_POINTER] * 3],
    "dequantise": [*[_POINTER] * 3, _INT, _INT, _LONG, _INT, _INT, _INT, _FLOAT, _INT, _INT, _LONG, _POINTER],
    "quantise_even": [_POINTER, _INT, _LONG, _LONG, _INT, _INT, _FLOAT, *[_POINTER] * 3],
    "dequantise_even": [*[_POINTER] * 3, _INT, _LONG, _INT, _INT, _LONG, _POINTER],
    "pack": [_POINTER, _LONG, _INT, _POINTER],
    "unpack": [_POINTER, _LONG, _INT, _POINTER],
    "split32": [_POINTER, _LONG, _LONG, _INT, _INT, *[_POINTER] * 3],
    "split16": [_POINTER, _LONG, _LONG, _INT, _INT, *[_POINTER] * 2],
    "join32": [*[_POINTER] * 3, _LONG, _POINTER],
    "join16": [*[_POINTER] * 2, _LONG, _POINTER],
    "gather": [_POINTER, _LONG, _LONG, _POINTER, _LONG, _INT, _LONG, _POINTER, _LONG, _LONG],
    "scatter": [_POINTER, _LONG, _LONG, _POINTER, _LONG, _INT, _LONG, _POINTER, _LONG, _LONG],
}


class Library:
    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))

        def function(name: str, result: Any = None) -> Any:
            found = getattr(loaded, f"baton_{name}")
            found.argtypes, found.restype = _ARGUMENTS[name], result
            return found

        self.quantise, self.dequantise = function("quantise", _INT), function("dequantise", _INT)
        self.quantise_even, self.dequantise_even = function("quantise_even", _INT), function("dequantise_even", _INT)
        self.pack, self.unpack = function("pack"), function("unpack")
        self.split32, self.split16 = function("split32"), function("split16")
        self.join32, self.join16 = function("join32"), function("join16")
        self.gather, self.scatter = function("gather", _INT), function("scatter", _INT)


@functools.cache
def load() -> Library | None:
    """The compiled loops, built at the first call of a machine; None, and a warning, where that fails."""
    try:
        return Library(native.library(SOURCE, FLAGS))
    except (native.BuildError, OSError) as error:
        log.warning("codecs run in plain torch, many times slower: %s", error)
        return None
