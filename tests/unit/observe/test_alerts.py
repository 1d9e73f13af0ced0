"""The alert rules: promtool tries each on series that must raise it and on series that must not; runbooks exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
RULES = ROOT / "deploy/monitoring/alerts.yaml"
STEPS = 100  # of 15 s: 25 minutes, more than any rule waits
WORKER = '{role="decode",worker="d-1"}'
BY_WORKER = {"role": "decode", "worker": "d-1"}
TTFT, TPOT = "gen_ai_server_time_to_first_token_seconds", "gen_ai_server_time_per_output_token_seconds"


def rises(per_step: float) -> str:
    """A counter that grows by so much in 15 s."""
    return f"0+{per_step}x{STEPS}"


def stays(value: float) -> str:
    return f"{value}x{STEPS}"


def buckets(name: str, low: float, high: float, *, fast: float) -> dict[str, str]:
    """A histogram of 9 observations in 15 s, of which ``fast`` are below ``low`` and all below ``high``."""
    counts = {f"{low:g}": fast, f"{high:g}": 9, "+Inf": 9}
    return {f'{name}_bucket{{le="{bound}"}}': rises(count) for bound, count in counts.items()}


@dataclass(frozen=True)
class Case:
    """``loud``: series that raise the alert, with these labels and this summary; ``quiet``: some that must not."""

    loud: dict[str, str]
    quiet: dict[str, str]
    summary: str
    labels: dict[str, str] = field(default_factory=dict)


CASES = {
    "BatonRouterDown": Case(
        {'up{job="baton",instance="a:1"}': stays(0)},
        {'up{job="baton",instance="a:1"}': stays(1)},
        "No metrics from router a:1",
        {"job": "baton", "instance": "a:1"},
    ),
    "BatonPoolEmpty": Case(
        {'baton_pool_workers_ready{role="prefill",instance="a"}': stays(2),
         'baton_pool_workers_ready{role="prefill",instance="b"}': stays(0)},
        {'baton_pool_workers_ready{role="prefill",instance="b"}': stays(1)},
        "A router can use no prefill worker",
        {"role": "prefill"},
    ),
    "BatonWorkerNotReady": Case(
        {f"baton_worker_ready{WORKER}": stays(0)},
        {f"baton_worker_ready{WORKER}": stays(1)},
        "Worker d-1 of decode is listed but not in use",
        BY_WORKER,
    ),
    "BatonWorkerSilent": Case(
        {f"baton_worker_load_age_seconds{WORKER}": stays(8)},
        {f"baton_worker_load_age_seconds{WORKER}": stays(0.4)},
        "Worker d-1 has not reported its load for 8s",
        BY_WORKER,
    ),
    "BatonFailing": Case(
        {'baton_router_failures_total{code="UNAVAILABLE"}': rises(3), "baton_router_requests_total": rises(100)},
        {'baton_router_failures_total{code="UNAVAILABLE"}': rises(0.5), "baton_router_requests_total": rises(100)},
        "3% of requests end with UNAVAILABLE",
        {"code": "UNAVAILABLE"},
    ),
    "BatonRetrying": Case(
        {'baton_router_retries_total{reason="decode_unavailable"}': rises(3)},
        {'baton_router_retries_total{reason="decode_unavailable"}': rises(1)},
        "Requests are tried again because of decode_unavailable",
        {"reason": "decode_unavailable"},
    ),
    "BatonGoodputLow": Case(
        {'baton_slo_kept_total{slo_class="chat"}': rises(8), 'baton_slo_requests_total{slo_class="chat"}': rises(10)},
        {'baton_slo_kept_total{slo_class="chat"}': rises(9.5), 'baton_slo_requests_total{slo_class="chat"}': rises(10)},
        "Only 80% of class chat keep their objectives",
        {"slo_class": "chat"},
    ),
    "BatonFirstTokenSlow": Case(
        buckets(TTFT, 5, 10, fast=0),
        buckets(TTFT, 5, 10, fast=9),
        "One request in ten waits 9.5s or longer for its first token",
    ),
    "BatonTokensSlow": Case(
        buckets(TPOT, 0.5, 1, fast=0),
        buckets(TPOT, 0.5, 1, fast=9),
        "One output in ten takes 950ms or longer per token",
    ),
    "BatonRefusing": Case(
        {'baton_router_rejections_total{reason="ttft"}': rises(20),
         "baton_router_requests_total": rises(100)},
        {'baton_router_rejections_total{reason="ttft"}': rises(5),
         'baton_router_rejections_total{reason="invalid_argument"}': rises(90),
         "baton_router_requests_total": rises(100)},
        "20% of requests are refused for lack of room",
    ),
    "BatonHandoffOverTcp": Case(
        {'baton_handoffs_total{transport="nixl",carrier="tcp/eth0",codec="raw"}': rises(1)},
        {'baton_handoffs_total{transport="nixl",carrier="cma/memory",codec="raw"}': rises(1),
         'baton_handoffs_total{transport="tcp",carrier="tcp",codec="raw"}': rises(1)},
        "NIXL moves KV by tcp/eth0",
        {"carrier": "tcp/eth0"},
    ),
    "BatonHandoffExposed": Case(
        {"baton_handoff_exposed_seconds_total": rises(6), "baton_handoff_busy_seconds_total": rises(10)},
        {"baton_handoff_exposed_seconds_total": rises(1), "baton_handoff_busy_seconds_total": rises(10)},
        "Clients wait for 60% of the handoff work",
    ),
    "BatonBuffersQuarantined": Case(
        {f"baton_worker_buffer_bytes_quarantined{WORKER}": stays(2097152)},
        {f"baton_worker_buffer_bytes_quarantined{WORKER}": f"5x20 0x{STEPS - 20}"},
        "2MiB of d-1 stay set aside after aborted transfers",
        BY_WORKER,
    ),
    "BatonPagesFull": Case(
        {f"baton_worker_pages_used{WORKER}": stays(99), f"baton_worker_pages_total{WORKER}": stays(100)},
        {f"baton_worker_pages_used{WORKER}": stays(80), f"baton_worker_pages_total{WORKER}": stays(100),
         "baton_router_inflight": stays(1)},
        "99% of the KV pages of d-1 are in use",
        BY_WORKER,
    ),
    "BatonPreempting": Case(
        {f"baton_worker_preemptions_total{WORKER}": rises(3)},
        {f"baton_worker_preemptions_total{WORKER}": rises(1)},
        "d-1 computes sequences again because others took their pages",
        BY_WORKER,
    ),
    "BatonLineLong": Case(
        {f"baton_worker_waiting{WORKER}": stays(40)},
        {f"baton_worker_waiting{WORKER}": stays(20)},
        "40 sequences wait at decode worker d-1",
        BY_WORKER,
    ),
    "BatonLeak": Case(
        {f"baton_worker_pages_used{WORKER}": stays(3), f"baton_worker_handoffs{WORKER}": stays(0),
         "baton_router_inflight": stays(0)},
        {f"baton_worker_pages_used{WORKER}": stays(3), f"baton_worker_handoffs{WORKER}": stays(0),
         'baton_router_inflight{router="a"}': stays(0), 'baton_router_inflight{router="b"}': stays(1)},
        "Workers hold pages or handoffs although no request is in flight",
    ),
    "BatonStrangers": Case(
        {f"baton_worker_connections_refused_total{WORKER}": rises(1)},
        {f"baton_worker_connections_refused_total{WORKER}": stays(7)},
        "Connections to d-1 did not prove the cluster key",
        BY_WORKER,
    ),
    "BatonKeysRefused": Case(
        {"baton_router_unauthenticated_total": rises(30)},
        {"baton_router_unauthenticated_total": rises(3)},
        "2 calls a second come without a good API key",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def rules() -> dict[str, dict[str, Any]]:
    """Every rule by its alert's name."""
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


@pytest.fixture(scope="module")
def promtool() -> str:
    """promtool, of Debian's package prometheus; $PROMETHEUS_BIN may name its folder."""
    path = os.pathsep.join(filter(None, (os.environ.get("PROMETHEUS_BIN"), os.environ.get("PATH"))))
    found = shutil.which("promtool", path=path)
    if found is None:
        pytest.skip("promtool is not here: apt-get install prometheus, or name its folder in PROMETHEUS_BIN")
    return found


def anchors(page: Path) -> set[str]:
    """What a link to a heading of ``page`` may end with, as GitHub makes it of the heading."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def trial(alert: str, series: dict[str, str], expected: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": alert,
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": "24m", "alertname": alert, "exp_alerts": expected}],
    }


def test_every_alert_is_tried(rules: dict[str, dict[str, Any]]) -> None:
    assert rules.keys() == CASES.keys()


def test_alerts_come_when_they_must_and_only_then(
    promtool: str, rules: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    trials = []
    for alert, case in CASES.items():
        rule = rules[alert]
        annotations = {"summary": case.summary, "runbook": rule["annotations"]["runbook"]}
        expected = {"exp_labels": case.labels | rule["labels"], "exp_annotations": annotations}
        trials += [trial(alert, case.loud, [expected]), trial(alert, case.quiet, [])]
    page = tmp_path / "trials.yaml"
    page.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": trials}), encoding="utf-8")
    done = subprocess.run(
        [promtool, "test", "rules", str(page)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_router_that_only_its_siblings_miss_is_down(promtool: str, tmp_path: Path) -> None:
    labels = {"instance": "a:1", "router": "r-2", "severity": "critical"}
    annotations = {"summary": "No metrics from router r-2", "runbook": "docs/operations.md#batonrouterdown"}
    series = {
        'up{job="baton",instance="a:1"}': stays(1),
        'baton_router_up{instance="a:1",router="r-1"}': stays(1),
        'baton_router_up{instance="a:1",router="r-2"}': stays(0),
    }
    case = trial("BatonRouterDown", series, [{"exp_labels": labels, "exp_annotations": annotations}])
    page = tmp_path / "trials.yaml"
    page.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": [case]}), encoding="utf-8")
    done = subprocess.run(
        [promtool, "test", "rules", str(page)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_expectation_is_noticed(promtool: str, tmp_path: Path) -> None:
    """That promtool's success means something."""
    case = CASES["BatonLeak"]
    page = tmp_path / "trials.yaml"
    wrong = {"rule_files": [str(RULES)], "tests": [trial("BatonLeak", case.loud, [])]}
    page.write_text(yaml.safe_dump(wrong), encoding="utf-8")
    done = subprocess.run(
        [promtool, "test", "rules", str(page)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0


def test_every_alert_leads_to_its_runbook(rules: dict[str, dict[str, Any]]) -> None:
    for alert, rule in rules.items():
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert anchor == alert.lower()
        assert anchor in anchors(ROOT / page), f"{page} has no heading {alert}"
        assert rule["labels"]["severity"] in ("critical", "warning")
