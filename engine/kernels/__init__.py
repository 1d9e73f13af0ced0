"""Triton kernels for NVIDIA GPUs, each beside a plain-torch twin in ``reference`` or ``reference_attention``.

Kernels read and accumulate in float32 and round once, when they store. Under ``TRITON_INTERPRET=1``, which must be set
before triton is first imported, they run on the CPU, thousands of times slower.
"""

import os

# Triton 3.10 stops fusing multiplications and additions by default, and 3.9 warns of it at each first compilation.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
