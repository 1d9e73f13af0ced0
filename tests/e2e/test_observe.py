"""A real cluster as its operators see it: its logs, a real Prometheus that scrapes it, and what the dashboards ask."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx2
import pytest
import yaml

from baton.wire import inference_pb2 as pb
from deploy.monitoring.dashboards import DASHBOARDS
from deploy.supervisor import free_ports

if TYPE_CHECKING:
    from tests.e2e.conftest import Client

pytestmark = pytest.mark.ray

MONITORING = Path(__file__).resolve().parents[2] / "deploy/monitoring"
SECRET = "zyzzyva kumquat oubliette"
JSON = {"content-type": "application/json"}
TRACE = "7d0f3c5a9b1e4d2f8a6c0b9e1f2d3c4b"
# Nothing fails here and nothing is tried again, so these have no series.
SILENT = ("baton_router_failures_total", "baton_router_retries_total")


def log_files(cluster: Client) -> list[Path]:
    """Every text file that the cluster writes: its own log, and those of all processes of its Ray."""
    state = cluster.home / "clusters"
    scratch = [Path(file.read_text(encoding="utf-8")) for file in state.glob("*/scratch")]
    roots = [state, *(folder / "ray" for folder in scratch)]
    return [path for root in roots for path in root.rglob("*") if path.is_file() and not path.is_symlink()]


def lines(cluster: Client) -> list[dict[str, Any]]:
    """The lines of router and workers."""
    found = []
    for path in log_files(cluster):
        if path.name.startswith("worker-") and path.suffix == ".err":
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith('{"time"'):
                    found.append(json.loads(line))
    return found


def test_logs_follow_a_request_through_all_processes_and_hold_no_prompt(tcp_cluster: Client) -> None:
    sampling = pb.Sampling(temperature=0, max_tokens=6, ignore_eos=True)
    request = pb.GenerateRequest(prompt=f"{SECRET} {'and so on ' * 40}", sampling=sampling, request_id="followed")
    answer = list(
        tcp_cluster.stub.Generate(request, timeout=60, metadata=[("traceparent", f"00-{TRACE}-{'1' * 16}-01")])
    )
    ids = pb.TokenIds(ids=[17, 40017, 23, 40123, 31, 40231, 37])
    tcp_cluster.generate(token_ids=ids, sampling=sampling)
    for bad in ({"sampling": pb.Sampling(temperature=9)}, {"model": SECRET}, {"budget_ms": 1}):
        with pytest.raises(grpc.RpcError):
            tcp_cluster.generate(**{"prompt": SECRET, **bad})
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4}
    with httpx2.Client(base_url=f"http://{tcp_cluster.http}", timeout=60) as http:
        assert http.post("/v1/chat/completions", json=body).status_code == 200
        assert http.post("/v1/chat/completions", json={**body, "temperature": 9}).status_code == 400
        assert http.post("/v1/chat/completions", content=json.dumps(body)[:-3], headers=JSON).status_code == 400
    tcp_cluster.wait_idle()

    deadline_s = time.monotonic() + 10
    while True:
        [*ended] = [line for line in lines(tcp_cluster) if line.get("client_request_id") == "followed"]
        ended = [line for line in ended if line["message"].startswith("request ended")]
        if ended:
            break
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    [line] = ended
    assert line["message"] == "request ended: OK"
    assert (line["trace_id"], line["output_tokens"]) == (TRACE, 6)
    elsewhere = {
        other["process"].split()[0] for other in lines(tcp_cluster) if other.get("request_id") == line["request_id"]
    }
    assert elsewhere == {"router", "prefill", "decode"}

    text = "".join(part.text for part in answer)
    wanted = ["zyzzyva", "kumquat", "40017, 23, 40123"] + ([text] if len(text) > 12 else [])
    files = log_files(tcp_cluster)
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        for secret in wanted:
            assert secret.encode() not in content, f"{path} holds {secret!r}"


@pytest.fixture
def prometheus(tcp_cluster: Client, tmp_path: Path) -> Iterator[httpx2.Client]:
    """A Prometheus with our configuration and rules that scrapes the cluster every second."""
    path = os.pathsep.join(filter(None, (os.environ.get("PROMETHEUS_BIN"), os.environ.get("PATH"))))
    binary = shutil.which("prometheus", path=path)
    if binary is None:
        pytest.skip("prometheus is not here: apt-get install prometheus, or name its folder in PROMETHEUS_BIN")
    tree = yaml.safe_load((MONITORING / "prometheus.yaml").read_text(encoding="utf-8"))
    tree["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    tree["scrape_configs"][0]["static_configs"] = [{"targets": [tcp_cluster.http]}]
    shutil.copy(MONITORING / "alerts.yaml", tmp_path)
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    listen = f"127.0.0.1:{free_ports(1)}"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [binary, "--config.file=prometheus.yaml", f"--storage.tsdb.path={tmp_path / 'data'}",
             f"--web.listen-address={listen}"],
            cwd=tmp_path, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        with httpx2.Client(base_url=f"http://{listen}", timeout=10) as http:
            deadline_s = time.monotonic() + 30
            while not _ready(http):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline_s
                time.sleep(0.2)
            yield http
    finally:
        process.terminate()
        process.wait(20)


def _ready(http: httpx2.Client) -> bool:
    try:
        return http.get("/-/ready").status_code == 200
    except httpx2.TransportError:
        return False


def ask(http: httpx2.Client, query: str) -> list[dict[str, Any]]:
    answer = http.get("/api/v1/query", params={"query": query.replace("$__rate_interval", "1m")}).json()
    assert answer["status"] == "success", (query, answer)
    result: list[dict[str, Any]] = answer["data"]["result"]
    return result


def wait_for(http: httpx2.Client, query: str, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not ask(http, query):
        assert time.monotonic() < deadline_s, (query, http.get("/api/v1/targets").text)
        time.sleep(0.3)


def load(cluster: Client) -> None:
    cluster.generate(
        prompt="The history of the steam engine " * 12, sampling=pb.Sampling(max_tokens=8, ignore_eos=True)
    )
    with pytest.raises(grpc.RpcError):
        cluster.generate(prompt="x", sampling=pb.Sampling(temperature=9))


def test_a_real_prometheus_takes_every_query_and_rule(tcp_cluster: Client, prometheus: httpx2.Client) -> None:
    load(tcp_cluster)
    wait_for(prometheus, 'up{job="baton"} == 1 and on () sum(baton_slo_requests_total) > 0')
    load(tcp_cluster)  # an increase is seen from the second scrape on
    wait_for(prometheus, "sum(increase(gen_ai_server_request_duration_seconds_count[1m])) > 0")
    assert [sample["value"][1] for sample in ask(prometheus, 'up{job="baton"}')] == ["1"]
    for query in dict.fromkeys(query for one in DASHBOARDS for query in one.queries):
        result = ask(prometheus, query)
        assert result or any(name in query for name in SILENT), f"nothing answers {query}"

    carried = ask(prometheus, "sum by (transport, carrier) (baton_handoffs_total)")
    assert [sample["metric"] for sample in carried] == [{"transport": "tcp", "carrier": "tcp"}]
    parts = "sum(increase(baton_stage_seconds_sum[1m])) / sum(increase(gen_ai_server_request_duration_seconds_sum[1m]))"
    assert float(ask(prometheus, parts)[0]["value"][1]) == pytest.approx(1.0, rel=0.01)

    rules = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    assert sum(len(group["rules"]) for group in rules) == len(_alerts())
    assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"}
    firing = prometheus.get("/api/v1/alerts").json()["data"]["alerts"]
    assert [alert["labels"]["alertname"] for alert in firing if alert["state"] == "firing"] == []


def _alerts() -> list[str]:
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    return [rule["alert"] for group in groups for rule in group["rules"]]
