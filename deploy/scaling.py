"""How many workers a pool wants, by what its workers hold. Pure.

Serve's own autoscaling counts the requests that pass through its handles, and none do: tokens and prompts travel on the
token plane (ADR 2). So every worker reports its load (``record_autoscaling_stats``), and this policy, which Serve's
controller calls, turns the mean over the last half minute into a number of workers. Limits and delays are Serve's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from baton.messages import Load

LOAD = "load"
FULL_LINE_S = 1.0  # of prompts: a prefill worker with such a line is fully loaded


class Context(Protocol):
    """What this policy reads of ``ray.serve.config.AutoscalingContext``."""

    @property
    def target_num_replicas(self) -> int: ...

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...


def prefill_load(load: Load) -> float:
    """Seconds of prompts that wait or are being computed, over :data:`FULL_LINE_S`."""
    return load.waiting_tokens * load.prompt_token_s / FULL_LINE_S


def decode_load(load: Load, max_running: int) -> float:
    """The scarcer of sequence slots and KV pages, as the share that is taken or waited for."""
    return max((load.running + load.waiting) / max_running, load.pages_used / max(1, load.pages_total))


def wanted(loads: Mapping[Any, float], target: float) -> int:
    """Workers among which ``loads`` would be ``target`` each; at least one."""
    return max(1, math.ceil(sum(loads.values()) / target - 1e-9))


class LoadPolicy:
    """The policy as Serve calls it. Without reports (workers are starting) nothing changes."""

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        loads = (context.aggregated_metrics or {}).get(LOAD, {})
        return (wanted(loads, self._target) if loads else context.target_num_replicas), {}
