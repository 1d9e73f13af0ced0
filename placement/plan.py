"""A plan: the pools to deploy, what they are predicted to do, and why it is these (:mod:`placement.explain`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import yaml

from baton import config
from placement import explain
from placement.composition import Affinity, Composition, Way
from placement.goodput import Trial
from placement.outcome import Attainment, End, Slo
from placement.profile import ProfiledReplica
from placement.roofline import GpuReplica
from placement.search import Found, Scored
from placement.stories import SERIAL

CURVE = (0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)  # rates over goodput


@dataclass(frozen=True, slots=True)
class PoolPlan:
    replicas: int
    tp: int
    pp: int
    page_tokens: int
    step_tokens: int
    max_running: int
    max_waiting: int
    mixed_tokens: int
    gap_s: float
    kv_tokens: int

    @classmethod
    def of(cls, way: Way, replicas: int) -> PoolPlan:
        limits = way.limits
        return cls(
            replicas, way.tp, way.pp, limits.page_tokens, limits.step_tokens, limits.max_running, limits.max_waiting,
            limits.mixed_tokens, limits.gap_s, way.cost.kv_tokens(),
        )  # fmt: skip

    @property
    def gpus(self) -> int:
        return self.replicas * self.tp * self.pp


@dataclass(frozen=True, slots=True)
class Point:
    """What the whole plan does at ``rate``. Busy: mean share of time in steps, per pool."""

    rate: float
    attainment: Attainment
    ttft_p90_s: float
    tpot_p90_s: float
    prefill_busy: float
    decode_busy: float
    refused: int


@dataclass(frozen=True, slots=True)
class Alternative:
    title: str
    gpus: int
    goodput: float


@dataclass(frozen=True, slots=True)
class Plan:
    """``cells`` independent clusters of these pools (one unless ``affinity`` is high). Rates in requests per second."""

    model: str
    hardware: str
    workload: str
    requests: int
    max_context: int
    slo: Slo
    affinity: Affinity
    cells: int
    prefill: PoolPlan | None
    decode: PoolPlan
    local_prefill: bool
    goodput: float
    curve: tuple[Point, ...]
    alternatives: tuple[Alternative, ...]
    bottleneck: str
    one_more: str
    at_double: str
    frontier: tuple[Alternative, ...] = ()  # other numbers of accelerators
    extrapolated: tuple[str, ...] = ()  # what the prediction at the goodput rests on that was not measured

    @property
    def gpus(self) -> int:
        return self.cells * (self.decode.gpus + (self.prefill.gpus if self.prefill else 0))

    @property
    def deployable(self) -> bool:
        """Whether this version's workers can be what the plan asks for: they have no pipeline stages."""
        return all(pool.pp == 1 for pool in (self.prefill, self.decode) if pool)

    def config_tree(self) -> dict[str, Any]:
        """The part of ``baton.config`` that the plan decides; validated. Raises :class:`baton.errors.ConfigError`.

        A plan that is not deployable asks for ``pipeline_parallel`` too, a key that configurations do not have: so
        ``baton up`` refuses it by name instead of starting something else.
        """
        tree = {
            "model": {"max_context": self.max_context},
            "prefill": _pool_tree(self.prefill) if self.prefill else {"replicas": 0, **_capacity(self.decode)},
            "decode": _pool_tree(self.decode),
            "router": {"local_prefill": self.local_prefill},
        }
        config.parse(tree, source="the plan")
        for name, pool in (("prefill", self.prefill), ("decode", self.decode)):
            if pool and pool.pp > 1:
                tree[name]["pipeline_parallel"] = pool.pp
        return tree

    def to_yaml(self) -> str:
        """A configuration file whose head tells what it is for."""
        return "".join(f"# {line}\n" for line in self.story()) + yaml.safe_dump(self.config_tree(), sort_keys=False)

    def story(self) -> Iterable[str]:
        slo = self.slo
        yield f"{self.goodput:.2f} requests/s on {self.gpus} x {self.hardware} ({self.goodput / self.gpus:.3f} each)"
        yield f"for {self.model}, requests as in {self.workload} (simulated with {self.requests})"
        yield f"TTFT <= {slo.ttft_s:g} s and TPOT <= {slo.tpot_s:g} s, both, for {slo.attainment:.0%} of requests"
        if self.prefill:
            yield f"prefill: {_degrees(self.prefill)}"
        yield f"decode{'' if self.prefill else ' (whole sequences)'}: {_degrees(self.decode)}"
        if self.local_prefill:
            yield "decode workers compute prompts themselves where the router finds that sooner"
        if self.affinity == "high":
            yield f"{self.cells} such clusters, each within one node"
        if not self.deployable:
            yield "NOT DEPLOYABLE: this version's workers have no pipeline stages; plan without --pipeline"
        yield f"bottleneck: {self.bottleneck}"
        yield f"one more: {self.one_more}"
        yield f"at twice the load: {self.at_double}"
        if self.extrapolated:
            yield f"beyond what was measured: {'; '.join(self.extrapolated)}"
        for other in self.alternatives:
            gain = self.goodput / other.goodput - 1
            yield f"against {other.title}: {other.goodput:.2f} requests/s; this plan {gain:+.1%}"


def make(chosen: Scored, found: Found, trial: Trial, labels: Mapping[str, str], *, executor: Executor = SERIAL) -> Plan:
    """The plan of ``chosen``. ``labels``: names of the model and the hardware."""
    composition, cell_goodput = chosen.composition, chosen.goodput / chosen.composition.cells
    measured = tuple(executor.map(_Measure(trial, composition), [share * cell_goodput for share in CURVE]))
    points = tuple(point for point, _ in measured)
    bottleneck, one_more = explain.more(chosen, found, trial, executor)
    longest = max(a.prompt_tokens + a.output_tokens for a in trial.workload.arrivals)
    return Plan(
        model=labels["model"],
        hardware=labels["hardware"],
        workload=trial.workload.name,
        requests=trial.requests,
        max_context=longest,
        slo=trial.slo,
        affinity=composition.affinity,
        cells=composition.cells,
        prefill=PoolPlan.of(composition.prefill, composition.prefills) if composition.prefill else None,
        decode=PoolPlan.of(composition.decode, composition.decodes),
        local_prefill=composition.local_prefill,
        goodput=chosen.goodput,
        curve=points,
        alternatives=tuple(
            Alternative(s.composition.title, s.composition.gpus, s.goodput)
            for s in found.best
            if s.composition != composition
        ),
        bottleneck=bottleneck,
        one_more=one_more,
        at_double=_at_double(points[-1], chosen),
        frontier=tuple(
            Alternative(other.title, other.gpus, goodput)
            for other, goodput in explain.frontier(found, composition.gpus, trial, executor)
        ),
        extrapolated=measured[CURVE.index(1.0)][1],
    )


@dataclass(frozen=True, slots=True)
class _Measure:
    """One point of the curve, for the whole plan, and what the costs behind it extrapolated."""

    trial: Trial
    composition: Composition

    def __call__(self, cell_rate: float) -> tuple[Point, tuple[str, ...]]:
        outcome = self.trial.run(self.composition.cluster, cell_rate)
        ttft_s, tpot_s = outcome.percentiles(0.9)
        point = Point(
            cell_rate * self.composition.cells,
            outcome.attainment(self.trial.slo),
            ttft_s,
            tpot_s,
            outcome.utilization("prefill"),
            outcome.utilization("decode"),
            outcome.count(End.REFUSED),
        )
        return point, _extrapolated(self.composition)


def _extrapolated(composition: Composition) -> tuple[str, ...]:
    """Reasons that the cost models counted, when they were made and since."""
    costs = [way.cost for way in (composition.prefill, composition.decode) if way]
    reasons = {
        reason for cost in costs if isinstance(cost, GpuReplica | ProfiledReplica) for reason in cost.extrapolations
    }
    return tuple(sorted(reasons))


def _at_double(point: Point, chosen: Scored) -> str:
    met = point.attainment
    return (
        f"{met.joint:.0%} meet both targets (TTFT {met.ttft:.0%}, TPOT {met.tpot:.0%}); "
        f"p90 TTFT {point.ttft_p90_s:.2f} s, p90 TPOT {1e3 * point.tpot_p90_s:.0f} ms, {point.refused} refused; "
        f"about {2 * chosen.composition.gpus} GPUs would meet it"
    )


def _pool_tree(pool: PoolPlan) -> dict[str, Any]:
    return {
        "replicas": pool.replicas,
        "tensor_parallel": pool.tp,
        **_capacity(pool),
        "step_tokens": pool.step_tokens,
        "max_running": pool.max_running,
        "max_waiting": pool.max_waiting,
        "mixed_tokens": pool.mixed_tokens,
        "gap_ms": round(1e3 * pool.gap_s, 3),
    }


def _capacity(pool: PoolPlan) -> dict[str, Any]:
    return {"page_tokens": pool.page_tokens, "kv_tokens": pool.kv_tokens}


def _degrees(pool: PoolPlan) -> str:
    return f"{pool.replicas} replicas of {pool.tp * pool.pp} GPU (tensor degree {pool.tp}, pipeline degree {pool.pp})"
