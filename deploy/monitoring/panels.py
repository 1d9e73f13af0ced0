"""Grafana dashboards as values: rows of panels, each a title, a unit and the queries that it draws.

Pure. The JSON follows Grafana's dashboard schema 39 (Grafana 10.4 and later); only what differs from its defaults is
written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

SCHEMA_VERSION = 39
WIDTH = 24  # columns of Grafana's grid
HEIGHT = 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

Unit = Literal["s", "reqps", "ops", "bytes", "Bps", "percentunit", "short"]


@dataclass(frozen=True, slots=True)
class Query:
    """One line of a panel, or several: ``legend`` names them by their labels."""

    promql: str
    legend: str = ""


def one(promql: str, legend: str = "") -> tuple[Query]:
    """What a panel with a single query draws."""
    return (Query(promql, legend),)


@dataclass(frozen=True, slots=True)
class Panel:
    """A drawing over time; ``stacked`` adds its lines up, ``single`` shows one number instead."""

    title: str
    unit: Unit
    queries: tuple[Query, ...]
    about: str = ""
    stacked: bool = False
    single: bool = False

    def drawn(self, number: int, x: int, y: int, width: int) -> dict[str, Any]:
        custom: dict[str, Any] = {"fillOpacity": 20 if self.stacked else 0, "showPoints": "never"}
        if self.stacked:
            custom["stacking"] = {"mode": "normal"}
        return {
            "id": number,
            "type": "stat" if self.single else "timeseries",
            "title": self.title,
            "description": self.about,
            "datasource": SOURCE,
            "gridPos": {"x": x, "y": y, "w": width, "h": HEIGHT},
            "fieldConfig": {"defaults": {"unit": self.unit, "min": 0, "custom": {} if self.single else custom}},
            "targets": [
                {"refId": chr(ord("A") + at), "datasource": SOURCE, "expr": query.promql, "legendFormat": query.legend}
                for at, query in enumerate(self.queries)
            ],
        }


@dataclass(frozen=True, slots=True)
class Row:
    """Panels side by side under a heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    """``name`` is the file's, and Grafana's stable id of it."""

    name: str
    title: str
    about: str
    rows: tuple[Row, ...]

    def drawn(self) -> dict[str, Any]:
        """The dashboard as Grafana imports it."""
        return {
            "uid": f"baton-{self.name}",
            "title": f"Baton: {self.title}",
            "description": self.about,
            "tags": ["baton"],
            "schemaVersion": SCHEMA_VERSION,
            "editable": True,
            "refresh": "10s",
            "time": {"from": "now-1h", "to": "now"},
            "templating": {
                "list": [{"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
            },
            "links": [{"type": "dashboards", "tags": ["baton"], "title": "Baton", "asDropdown": True}],
            "panels": self._panels(),
        }

    def _panels(self) -> list[dict[str, Any]]:
        drawn: list[dict[str, Any]] = []
        y = 0
        for row in self.rows:
            drawn.append(
                {"id": len(drawn) + 1, "type": "row", "title": row.title, "collapsed": False, "panels": [],
                 "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}}
            )  # fmt: skip
            width = WIDTH // len(row.panels)
            for at, panel in enumerate(row.panels):
                drawn.append(panel.drawn(len(drawn) + 1, at * width, y + 1, width))
            y += HEIGHT + 1
        return drawn

    @property
    def queries(self) -> tuple[str, ...]:
        """The PromQL of every panel."""
        return tuple(query.promql for row in self.rows for panel in row.panels for query in panel.queries)


def per_second(metric: str, *by: str, where: str = "") -> str:
    """The rate of a counter, summed over everything but the labels in ``by``."""
    grouped = f" by ({', '.join(by)})" if by else ""
    return f"sum{grouped} (rate({metric}{where}[$__rate_interval]))"


def share(part: str, whole: str, *by: str) -> str:
    """Of two counters, what the first is of the second."""
    return f"{per_second(part, *by)} / {per_second(whole, *by)}"


def quantiles(histogram: str, *by: str, of: Sequence[float] = (0.5, 0.9, 0.99)) -> tuple[Query, ...]:
    """Quantiles of a histogram without its suffix."""
    legend = " ".join(f"{{{{{label}}}}}" for label in by)
    return tuple(
        Query(
            f"histogram_quantile({quantile}, {per_second(f'{histogram}_bucket', 'le', *by)})",
            f"p{quantile * 100:g} {legend}".strip(),
        )
        for quantile in of
    )


def held(metric: str) -> str:
    """A gauge of workers. Every router tells of every worker, so the same one is there several times."""
    return f"max by (role, worker) ({metric})"


def grown(metric: str) -> str:
    """The rate of a counter of workers, as :func:`held`."""
    return held(f"rate({metric}[$__rate_interval])")
