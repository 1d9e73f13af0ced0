"""Compiles every kernel for sm_80 (A100) and sm_90 (H100, H200), without a GPU, and reports what each one uses.

``python -m engine.kernels.aot [MODULE ...]`` prints registers, shared memory and spilled bytes, and fails when anything
spills. What Triton compiled before comes from its cache.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels.specialisation import Specialisation

MODULES = ("norm", "rope", "activation", "sampling", "codec", "codec_words", "paged_decode", "paged_prefill")
WARP = 32
TIMEOUT_S = 60.0  # of one call to cuobjdump; it takes well under one second
_RESOURCE = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")


@dataclass(frozen=True, slots=True)
class Built:
    """What one compiled kernel takes of a multiprocessor."""

    name: str
    capability: int
    warps: int
    registers: int  # per thread
    shared_bytes: int  # per program
    spilled_bytes: int  # per thread: stack and local memory


def build(spec: Specialisation, capability: int) -> Built:
    """Compiles ``spec`` for GPUs of ``capability``. Raises what Triton raises."""
    # Sorted, because their order is part of the key of Triton's cache.
    divisible = {(spec.fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in sorted(spec.aligned)}
    source = ASTSource(spec.fn, dict(spec.signature), dict(spec.constexprs), divisible)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)
    registers, spilled = _resources(compiled.asm["cubin"])
    return Built(spec.name, capability, spec.num_warps, registers, compiled.metadata.shared, spilled)


def build_all(modules: Sequence[str] = MODULES) -> Iterator[Built]:
    """Every specialisation of ``modules`` for every supported GPU, in processes of their own, in order."""
    jobs = [(m, i, c) for m in modules for i, spec in enumerate(_specialisations(m)) for c in spec.capabilities]
    # Forked children would share the compiler's threads; one process of its own each is clean and costs 0.3 s.
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_build, *zip(*jobs, strict=True))


def _build(module: str, index: int, capability: int) -> Built:
    return build(_specialisations(module)[index], capability)


def _specialisations(module: str) -> Sequence[Specialisation]:
    specialisations: Sequence[Specialisation] = import_module(f"engine.kernels.{module}").SPECIALISATIONS
    return specialisations


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes a thread, as the cubin declares them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout
    used = {name: int(value) for name, value in _RESOURCE.findall(told)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def main(modules: Sequence[str]) -> int:
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    print(f"Triton {triton.__version__}, cache {Path(triton.knobs.cache.dir)}")
    print(f"{'kernel':<56} {'GPU':>6} {'warps':>6} {'registers':>10} {'shared B':>9} {'spilled B':>10}")
    spilling = 0
    for built in build_all(modules or MODULES):
        spilling += built.spilled_bytes > 0
        print(
            f"{built.name:<56} {f'sm_{built.capability}':>6} {built.warps:>6} {built.registers:>10} "
            f"{built.shared_bytes:>9} {built.spilled_bytes:>10}",
            flush=True,
        )
    if spilling:
        print(f"{spilling} kernels spill registers", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
