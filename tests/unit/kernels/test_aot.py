"""The ahead-of-time build, in a process of its own: compiled kernels and interpreted ones do not mix."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from engine.kernels.specialisation import Specialisation

TIMEOUT_S = 120.0
SPILLING = """
from dataclasses import replace
from engine.kernels.aot import build
from engine.kernels.norm import SPECIALISATIONS
widest = next(spec for spec in SPECIALISATIONS if spec.name == "add_norm[bf16, 16384]")
print(build(replace(widest, num_warps=1), 90).spilled_bytes)
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parents[3],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_a_module_is_compiled_for_both_generations() -> None:
    done = run("-m", "engine.kernels.aot", "activation")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("silu_mul[")]
    assert [(row[0], row[1]) for row in rows] == [
        (f"silu_mul[{dtype}]", gpu) for dtype in ("bf16", "fp32") for gpu in ("sm_80", "sm_90")
    ]
    for row in rows:
        warps, registers, _, spilled = map(int, row[2:])
        assert warps == 4
        assert 8 <= registers <= 255
        assert spilled == 0


def test_spilling_is_seen() -> None:
    done = run("-c", SPILLING)  # 512 values a thread
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_interpreted_kernels_are_refused() -> None:
    done = run("-m", "engine.kernels.aot", "activation", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def test_specialisations_name_every_argument() -> None:
    from engine.kernels import activation, codec, codec_words, norm, paged_decode, paged_prefill, rope, sampling

    for module in (activation, codec, codec_words, norm, paged_decode, paged_prefill, rope, sampling):
        specs: tuple[Specialisation, ...] = module.SPECIALISATIONS
        forms = [(spec.name, capability) for spec in specs for capability in spec.capabilities]
        assert len(set(forms)) == len(forms)
        for spec in specs:
            constants = {name for name, kind in spec.signature.items() if kind == "constexpr"}
            assert set(spec.signature) == set(spec.fn.arg_names), spec.name
            assert constants == set(spec.constexprs), spec.name
            assert spec.aligned <= set(spec.signature) - constants, spec.name
