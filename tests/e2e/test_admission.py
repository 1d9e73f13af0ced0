"""Refusals of a real cluster: what is bound to be late is told so at once, with a reason and a time to come back."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from baton.wire import inference_pb2 as pb

if TYPE_CHECKING:
    from tests.e2e.conftest import Client

LONG = pb.TokenIds(ids=[random.Random(5).randrange(100, 40_000) for _ in range(1900)])
SHORT_BUDGET_MS = 60  # no CPU computes 1,900 tokens in so little


def details(error: grpc.RpcError) -> tuple[str, float]:
    """The reason and the seconds to come back after."""
    metadata = dict(error.trailing_metadata())
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(metadata["grpc-status-details-bin"]).details:
        detail.Unpack(info)
        detail.Unpack(retry)
    return info.reason, retry.retry_delay.ToTimedelta().total_seconds()


def test_what_is_bound_to_miss_its_deadline_is_refused_before_it(nixl_cluster: Client) -> None:
    nixl_cluster.generate(prompt="Both workers measure something", sampling=pb.Sampling(max_tokens=4, ignore_eos=True))
    busy = nixl_cluster.stream(prompt="Once upon a time", sampling=pb.Sampling(max_tokens=1500, ignore_eos=True))
    next(busy)  # something is under way: an idle service lets everybody try
    started_s = time.monotonic()
    with pytest.raises(grpc.RpcError) as refused:
        nixl_cluster.generate(token_ids=LONG, budget_ms=SHORT_BUDGET_MS, sampling=pb.Sampling(max_tokens=4))
    took_s = time.monotonic() - started_s
    busy.cancel()
    reason, retry_s = details(refused.value)
    assert (refused.value.code(), reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DEADLINE"), refused.value.details()
    assert 0.1 <= retry_s <= 60.0
    assert took_s < 1.0
    nixl_cluster.wait_idle()
    assert nixl_cluster.status().router.refusals["deadline"] >= 1
    answer = nixl_cluster.generate(
        token_ids=LONG, slo_class="batch", sampling=pb.Sampling(max_tokens=2, ignore_eos=True)
    )
    assert len(answer.tokens) == 2


def test_an_unknown_class_is_the_clients_mistake(nixl_cluster: Client) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        nixl_cluster.generate(prompt="x", slo_class="gold")
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details() == "slo_class: unknown class 'gold'; known: interactive, standard, batch"
