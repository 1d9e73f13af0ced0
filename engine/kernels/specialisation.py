"""One compiled form of a kernel: what the ahead-of-time build compiles, and the launch options it must use.

Pure data, so that a list of specialisations can be read without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Specialisation:
    """Arguments of ``triton.compile`` for one kernel and one set of compile-time constants."""

    name: str  # unique in its module, as in ``paged_decode[bf16, head 128, 4 queries a KV head]``
    fn: Any  # the ``triton.jit`` function; under TRITON_INTERPRET=1 an interpreted one, which cannot be compiled
    signature: Mapping[str, str]  # argument to Triton's type name: ``*bf16``, ``i32``, ``fp32``, ``constexpr``
    constexprs: Mapping[str, object]  # argument to value, for every argument that is ``constexpr`` in the signature
    num_warps: int
    num_stages: int
    aligned: frozenset[str] = frozenset()  # arguments divisible by 16 (pointers: in bytes), as the launcher sees them
    capabilities: tuple[int, ...] = (80, 90)  # compute capabilities whose GPUs use this form
