"""What this router and its workers hold, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.wire import inference_pb2 as pb

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OUTCOMES = ("refused", "completed", "failed", "cancelled")
COUNTED = "connections_refused"  # the one field of Load that only grows
HELD = tuple(field.name for field in pb.Load.DESCRIPTOR.fields if field.name != COUNTED)


class _Status(Collector):
    """Asks for the status anew at each scrape."""

    def __init__(self, report: Callable[[], pb.GetStatusResponse]) -> None:
        self._report = report

    def collect(self) -> Iterator[Metric]:
        status = self._report()
        yield from _router(status.router)
        yield from _workers(status)


def text(report: Callable[[], pb.GetStatusResponse]) -> bytes:
    """The exposition of what ``report`` says now, in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Status(report))
    return generate_latest(registry)


def _router(router: pb.RouterStatus) -> Iterator[Metric]:
    inflight = GaugeMetricFamily("baton_router_inflight", "Requests being served now.", labels=["router"])
    inflight.add_metric([router.id], router.inflight)
    requests = CounterMetricFamily("baton_router_requests", "Requests by how they ended.", labels=["router", "outcome"])
    for outcome in OUTCOMES:
        requests.add_metric([router.id, outcome], getattr(router, outcome))
    tokens = CounterMetricFamily("baton_router_tokens", "Output tokens sent to clients.", labels=["router"])
    tokens.add_metric([router.id], router.tokens)
    yield from (inflight, requests, tokens)


def _workers(status: pb.GetStatusResponse) -> Iterator[Metric]:
    """Every field of Load, and whether the worker is in use."""
    labels = ["role", "worker"]
    ready = GaugeMetricFamily("baton_worker_ready", "1 while the router can use the worker.", labels=labels)
    loads: dict[str, GaugeMetricFamily | CounterMetricFamily] = {
        name: GaugeMetricFamily(f"baton_worker_{name}", f"Load.{name} of the contract.", labels=labels) for name in HELD
    }
    loads[COUNTED] = CounterMetricFamily(f"baton_worker_{COUNTED}", f"Load.{COUNTED} of the contract.", labels=labels)
    for pool in status.pools:
        for worker in pool.workers:
            ready.add_metric([pool.role, worker.id], worker.state == pb.WORKER_STATE_READY)
            for name, metric in loads.items():
                metric.add_metric([pool.role, worker.id], getattr(worker.load, name))
    yield from (ready, *loads.values())
