"""What is simulated: pools of workers, how requests get in and are placed, and what happens to workers meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from baton.config_admission import AdmissionConfig
from baton.config_routing import Strategy
from placement.cost import CostModel
from placement.host import SharedMachine
from placement.replica import EngineLimits
from placement.router_view import Role


@dataclass(frozen=True, slots=True)
class Pool:
    """Replicas of one kind. A pipeline of ``stages`` keeps as many batches in flight, each with its share of the KV."""

    cost: CostModel
    replicas: int
    limits: EngineLimits = field(default_factory=EngineLimits)
    stages: int = 1

    @property
    def gpus(self) -> int:
        return self.replicas * self.cost.gpus


@dataclass(frozen=True, slots=True)
class Cluster:
    """Both pools; without ``prefill`` the decode workers compute whole sequences. ``attempts``: tries per request.

    ``paired``: as in DistServe's simulator request n goes to the n-th pair of workers in turn, and its prefill does not
    wait for the decode worker to take it in between two steps. ``admission``: None sends every request to the workers
    as it comes. ``machine``: where all workers are on one, see :mod:`placement.host`; None: each has its own.
    """

    decode: Pool
    prefill: Pool | None = None
    max_inflight: int = 1 << 20
    attempts: int = 3
    strategy: Strategy = "prefix_affinity"
    affinity_factor: float = 1.5
    local_prefill: bool = False  # decode workers compute prompts where that is sooner (router.policy)
    admission: AdmissionConfig | None = None
    machine: SharedMachine | None = None
    paired: bool = False

    @property
    def gpus(self) -> int:
        return self.decode.gpus + (self.prefill.gpus if self.prefill else 0)


@dataclass(frozen=True, slots=True)
class Change:
    """At ``at_s``: a worker dies or returns, or a pool grows by one or drains its newest worker."""

    at_s: float
    role: Role
    kind: Literal["kill", "return", "grow", "shrink"]
    index: int = 0  # which worker, for kill and return
