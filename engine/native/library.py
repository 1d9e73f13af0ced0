"""The kernels' C interface: each function with its arguments' types. ctypes lets go of the GIL while they run."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

_POINTER, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double

_ARGUMENTS: dict[str, list[Any]] = {
    "pack": [_POINTER] * 2 + [_INT] * 3,
    "linear": [_POINTER] * 4 + [_INT] * 4,
    "norm": [_POINTER] * 4 + [_INT] * 2 + [_DOUBLE, _INT],
    "silu_mul": [_POINTER] * 2 + [_INT] * 3,
    "slots": [_POINTER, _INT, _INT, _POINTER],
    "rope_write": [_POINTER] * 5 + [_INT] * 5,
    "attend": [_POINTER, _INT, _INT, _INT] + [_POINTER] * 3 + [_INT] * 5,
}


class Library:
    """What engine/native/kernels.cpp exports. Pointers are addresses; sizes are in elements."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        loaded.baton_panel.restype = _INT
        self.panel: int = loaded.baton_panel()

        def function(name: str, suffix: str = "") -> Any:
            found = getattr(loaded, f"baton_{name}{suffix}")
            found.argtypes, found.restype = _ARGUMENTS[name], None
            return found

        self.norm, self.silu_mul, self.slots = function("norm"), function("silu_mul"), function("slots")
        self.pack_f32, self.pack_bf16 = function("pack", "_f32"), function("pack", "_bf16")
        self.linear_f32, self.linear_bf16 = function("linear", "_f32"), function("linear", "_bf16")
        self.rope_write_f32, self.rope_write_bf16 = function("rope_write", "_f32"), function("rope_write", "_bf16")
        self.attend_f32, self.attend_bf16 = function("attend", "_f32"), function("attend", "_bf16")
