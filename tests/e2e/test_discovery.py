"""What a client finds without our files: reflection, health, models, status, tokens."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.wire import inference_pb2 as pb
from engine.text import Tokenizer

pytestmark = pytest.mark.ray


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_reflection_only_client_generates(nixl_cluster: Any) -> None:
    from grpc_requests import Client as ReflectionClient

    client = ReflectionClient.get_by_endpoint(nixl_cluster.address)
    assert "baton.v1.Inference" in client.service_names
    chunks = list(
        client.request(
            "baton.v1.Inference",
            "Generate",
            {"prompt": "The capital of France is", "sampling": {"temperature": 0.0, "max_tokens": 8}},
        )
    )
    assert "Paris" in "".join(chunk.get("text", "") for chunk in chunks)


def test_health_says_serving(nixl_cluster: Any) -> None:
    stub = health_pb2_grpc.HealthStub(nixl_cluster.channel)
    for service in ("", "baton.v1.Inference"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"), timeout=5)
    assert next(iter(watch)).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def test_models_and_tokens(nixl_cluster: Any, model_folder: Path) -> None:
    (model,) = nixl_cluster.stub.ListModels(pb.ListModelsRequest(), timeout=5).models
    assert model.id == "smollm2-135m-instruct"
    assert model.vocab_size == 49152
    assert model.max_context_tokens == 2048
    tokens = nixl_cluster.stub.Tokenize(pb.TokenizeRequest(prompt="Hello, 世界"), timeout=5).token_ids
    assert list(tokens) == list(Tokenizer(model_folder).encode("Hello, 世界"))


def test_status_names_every_worker(nixl_cluster: Any) -> None:
    status = nixl_cluster.status()
    assert [pool.role for pool in status.pools] == ["prefill", "decode"]
    for pool in status.pools:
        (worker,) = pool.workers
        assert worker.state == pb.WORKER_STATE_READY
        assert worker.load.pages_total > 0
        assert worker.load_age_s < 5
    assert status.transport == "nixl"
    assert len(status.layout) == 16


def test_http_health(nixl_cluster: Any) -> None:
    with urllib.request.urlopen(f"http://{nixl_cluster.http}/health", timeout=5) as reply:
        assert reply.status == 200
