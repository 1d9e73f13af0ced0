"""What one accelerator and its links can do, read from a YAML file.

The form is the one of aiconfigurator's system files (``gpu``, ``node``, ``misc``), so that those can be used as they
are. ``baton plan --hardware`` takes a path or one of :data:`BUILT_IN`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from baton.errors import ConfigError

DATA = Path(__file__).parent / "data"
BUILT_IN: tuple[str, ...] = ("a100-80g-sxm", "h100-sxm", "h200-sxm")

# What GEMMs reach of the peak, and attention of it, when no table says better. The GEMM figure is what large bf16
# multiplications reach on an H200 (790 of 989 TFLOP/s); the attention figure is an assumption between the 0.24 of the
# H200 table and the 0.65-0.75 that the FlashAttention-3 paper reports.
GEMM_EFFICIENCY = 0.8
ATTENTION_EFFICIENCY = 0.5


@dataclass(frozen=True, slots=True)
class Hardware:
    """One accelerator type. Bandwidths are per accelerator and single direction."""

    name: str
    flops: Mapping[str, float]  # dtype -> peak multiply-add FLOP/s of dense matrices
    memory_bytes: int
    memory_bytes_per_s: float
    memory_efficiency: float  # share of the peak bandwidth that kernels reach
    launch_s: float  # least time of one kernel
    gpus_per_node: int
    intra_node_bytes_per_s: float
    inter_node_bytes_per_s: float
    link_latency_s: float
    reserved_bytes: int  # context, activations, fragmentation
    collective_bytes: Mapping[int, int]  # ranks -> communicator buffers

    @classmethod
    def load(cls, source: str | Path) -> Hardware:
        """From a YAML file or a built-in name. Raises :class:`baton.errors.ConfigError` that names the key."""
        path = DATA / f"{source}.yaml" if str(source) in BUILT_IN else Path(source)
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            allowed = f"a YAML file or one of {', '.join(BUILT_IN)}"
            raise ConfigError(f"cannot read {path} ({error.strerror}); expected {allowed}", field="hardware") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not YAML: {error}", field="hardware") from None
        return cls.from_tree(path.stem.replace("_", "-"), tree)

    @classmethod
    def from_tree(cls, name: str, tree: Any) -> Hardware:
        gpu, node = _section(tree, "gpu"), _section(tree, "node")
        misc = tree.get("misc") or {}
        flops = {key.removesuffix("_tc_flops"): _positive(gpu, "gpu", key) for key in gpu if key.endswith("_tc_flops")}
        if not flops:
            raise ConfigError("no <dtype>_tc_flops", field="hardware.gpu")
        return cls(
            name=name,
            flops=flops,
            memory_bytes=int(_positive(gpu, "gpu", "mem_capacity")),
            memory_bytes_per_s=_positive(gpu, "gpu", "mem_bw"),
            memory_efficiency=_positive(gpu, "gpu", "mem_bw_empirical_scaling_factor", 0.8),
            launch_s=_positive(gpu, "gpu", "mem_empirical_constant_latency", 3e-6),
            gpus_per_node=int(_positive(node, "node", "num_gpus_per_node")),
            intra_node_bytes_per_s=_positive(node, "node", "intra_node_bw"),
            inter_node_bytes_per_s=_positive(node, "node", "inter_node_bw"),
            link_latency_s=_positive(node, "node", "p2p_latency", 1e-5),
            reserved_bytes=int(misc.get("other_mem", 0)),
            collective_bytes={int(ranks): int(size) for ranks, size in (misc.get("nccl_mem") or {}).items()},
        )

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s of dense matrices in ``dtype``; raises :class:`ConfigError` where the file has none."""
        if dtype not in self.flops:
            raise ConfigError(f"{self.name} has no {dtype}; it has {', '.join(sorted(self.flops))}", field="dtype")
        return self.flops[dtype]

    @property
    def stream_bytes_per_s(self) -> float:
        """Memory bandwidth that kernels reach."""
        return self.memory_bytes_per_s * self.memory_efficiency

    def link_bytes_per_s(self, ranks: int) -> float:
        """Bandwidth between the ranks of one group: the slower link where the group leaves its node."""
        return self.intra_node_bytes_per_s if ranks <= self.gpus_per_node else self.inter_node_bytes_per_s


def _section(tree: Any, key: str) -> Mapping[str, Any]:
    section = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(section, dict):
        raise ConfigError("missing, or not a mapping", field=f"hardware.{key}")
    return section


def _positive(section: Mapping[str, Any], name: str, key: str, default: float | None = None) -> float:
    value = section.get(key, default)
    if isinstance(value, str):  # YAML 1.1 reads 4.8e12 as text
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"is {section.get(key)!r}, expected a positive number", field=f"hardware.{name}.{key}")
    return float(value)
