"""What the router counts and times, against the slow way to count it, and as Prometheus's own parser reads it."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Mapping
from types import MappingProxyType

import pytest
from prometheus_client.parser import text_string_to_metric_families

from baton import ledger
from baton.ledger import Ledger
from baton.wire import inference_pb2 as pb
from router import metrics
from router.meters import MOST_LABELS, OTHER, Ended, Histogram, Meters, Objectives, Tally

CLASSES = {"interactive": Objectives(ttft_s=0.5, tpot_s=0.1), "batch": Objectives()}


def ended(slo_class: str = "batch", *, tokens: int = 11, ttft_s: float = 0.2, total_s: float = 1.2) -> Ended:
    stages = ledger.close(total_s, {"queue": 0.05, "prefill": 0.1, "wire": 0.02, "decode": total_s - 0.2})
    return Ended(
        operation="chat",
        slo_class=slo_class,
        prompt_tokens=100,
        output_tokens=tokens,
        ttft_s=ttft_s,
        ledger=Ledger(total_s, stages, transfer_busy_s=0.1, transfer_bytes=4096, codec="raw", transport="nixl"),
        codec_tokens={"raw": 300, "lossless": 900},
        carrier="cma/memory (intra-node, zero-copy)",
    )


def samples(
    meters: Meters, status: pb.GetStatusResponse | None = None, usable: Mapping[str, int] = MappingProxyType({})
) -> dict[str, float]:
    """Every sample by ``name{label=value,...}``."""
    status = status or pb.GetStatusResponse(model="m", transport="nixl")
    text = metrics.text(lambda: status, meters, usable=usable).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_a_histogram_counts_as_one_would_by_hand() -> None:
    numbers = random.Random(3)
    histogram = Histogram((0.1, 0.5, 1.0))
    values = [numbers.choice([0.1, 0.5, 1.0, numbers.expovariate(1.0)]) for _ in range(500)]
    for value in values:
        histogram.observe(value)
    bounds = [0.0, *histogram.bounds, float("inf")]
    slow = [sum(low < value <= high for value in values) for low, high in itertools.pairwise(bounds)]
    assert histogram.counts == slow
    assert histogram.count == 500
    assert histogram.sum == pytest.approx(sum(values))


def test_labels_stay_few() -> None:
    tally = Tally("carrier", "codec")
    for number in range(1000):
        tally.add(f"carrier {number}", "raw", amount=2)
    assert len(tally.sums) == MOST_LABELS + 1
    assert tally.sums[OTHER, OTHER] == 2 * (1000 - MOST_LABELS)
    tally.add("carrier 0", "raw")
    assert tally.sums["carrier 0", "raw"] == 3


def test_goodput_is_joint_and_counts_refusals() -> None:
    meters = Meters(CLASSES)
    meters.ended(ended("interactive"))  # 0.2 s, then 0.1 s per token
    meters.ended(ended("interactive", ttft_s=0.6, total_s=0.7))  # the first token is late
    meters.ended(ended("interactive", ttft_s=0.4, total_s=2.0))  # the others are
    meters.ended(ended("interactive", tokens=1, ttft_s=0.4, total_s=0.4))  # there are no others
    meters.ended(ended("batch", ttft_s=100.0, total_s=900.0))  # nothing was promised
    meters.rejected("predicted_ttft", "interactive", outputs=2)
    meters.rejected("invalid_argument")  # the client's doing is nobody's miss
    meters.failed("UNAVAILABLE", "interactive")
    assert (dict(meters.kept), dict(meters.judged)) == (
        {"interactive": 2, "batch": 1},
        {"interactive": 7, "batch": 1},
    )


def test_prometheus_reads_what_was_observed() -> None:
    meters = Meters(CLASSES)
    for _ in range(3):
        meters.ended(ended())
    meters.retried("unavailable")
    meters.rejected("max_inflight", "batch")
    found = samples(meters)
    about = "gen_ai_operation_name=chat,gen_ai_provider_name=baton,gen_ai_request_model=m"
    assert found[f"gen_ai_server_time_to_first_token_seconds_count{{{about}}}"] == 3
    assert found[f"gen_ai_server_time_to_first_token_seconds_bucket{{{about},le=0.25}}"] == 3
    assert found[f"gen_ai_server_time_to_first_token_seconds_bucket{{{about},le=0.1}}"] == 0
    assert found[f"gen_ai_server_time_per_output_token_seconds_sum{{{about}}}"] == pytest.approx(0.3)
    stages = [found[f"baton_stage_seconds_sum{{stage={stage}}}"] for stage in ledger.STAGES]
    assert sum(stages) == pytest.approx(found[f"gen_ai_server_request_duration_seconds_sum{{{about}}}"])
    carrier = "carrier=cma/memory (intra-node, zero-copy)"
    assert found[f"baton_handoffs_total{{{carrier},codec=lossless,transport=nixl}}"] == 3
    assert found[f"baton_handoff_bytes_total{{{carrier},transport=nixl}}"] == 3 * 4096
    assert found["baton_handoff_codec_tokens_total{codec=raw}"] == 900
    assert found["baton_handoff_busy_seconds_total{}"] == pytest.approx(0.3)
    assert found["baton_handoff_exposed_seconds_total{}"] == pytest.approx(0.06)
    assert found["baton_router_retries_total{reason=unavailable}"] == 1
    assert found["baton_router_rejections_total{reason=max_inflight}"] == 1
    assert found["baton_slo_seconds{objective=ttft,slo_class=interactive}"] == 0.5
    assert found["baton_slo_requests_total{slo_class=batch}"] == 4


def test_a_pool_without_workers_is_seen_and_a_pool_that_there_is_not_is_not() -> None:
    pools = [pb.Pool(role="prefill"), pb.Pool(role="decode", workers=[pb.Worker(id="d", state=pb.WORKER_STATE_READY)])]
    both = samples(Meters(CLASSES), pb.GetStatusResponse(transport="nixl", pools=pools), {"decode": 1})
    assert (both["baton_pool_workers_ready{role=prefill}"], both["baton_pool_workers_ready{role=decode}"]) == (0, 1)
    one = samples(Meters(CLASSES), pb.GetStatusResponse(pools=pools))
    assert "baton_pool_workers_ready{role=prefill}" not in one


def test_a_pool_of_suspects_is_in_use() -> None:
    pools = [pb.Pool(role="decode", workers=[pb.Worker(id="d", state=pb.WORKER_STATE_SUSPECT)])]
    found = samples(Meters(CLASSES), pb.GetStatusResponse(pools=pools), {"decode": 1})
    assert found["baton_pool_workers_ready{role=decode}"] == 1
    assert found["baton_worker_ready{role=decode,worker=d}"] == 0


def test_observing_costs_little() -> None:
    """Once per request; the bound is generous, since the machine may be busy: about 0.01 ms where it is not."""
    meters, one = Meters(CLASSES), ended()
    begun_s = time.perf_counter()
    for _ in range(1000):
        meters.ended(one)
    assert time.perf_counter() - begun_s < 0.5
