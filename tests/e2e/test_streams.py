"""Many streams at once: each as if it were alone, and cancelled ones leave nothing behind."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from baton.wire import inference_pb2 as pb

pytestmark = pytest.mark.ray

STREAMS = 32


def requests() -> list[dict[str, Any]]:
    """Mixed lengths, half of them sampled with a seed."""
    rng = random.Random(11)
    made = []
    for index in range(STREAMS):
        length = rng.choice([1, 5, 17, 40, 100, 250, 600])
        made.append(
            {
                "token_ids": pb.TokenIds(ids=[rng.randrange(100, 49000) for _ in range(length)]),
                "sampling": pb.Sampling(
                    temperature=0.0 if index % 2 else 0.9,
                    top_p=1.0 if index % 2 else 0.9,
                    seed=index,
                    max_tokens=rng.choice([1, 8, 24, 48]),
                    ignore_eos=True,
                ),
            }
        )
    return made


def test_concurrent_streams_equal_single_ones(nixl_cluster: Any) -> None:
    made = requests()
    with ThreadPoolExecutor(STREAMS) as pool:
        together = list(pool.map(lambda fields: nixl_cluster.generate(**fields), made))
    alone = [nixl_cluster.generate(**fields) for fields in made]
    for index, (one, other) in enumerate(zip(together, alone, strict=True)):
        assert one.tokens == other.tokens, f"stream {index}"
        assert len(one.tokens) == made[index]["sampling"].max_tokens
        assert one.text == other.text
    nixl_cluster.wait_idle()


def test_cancelling_half_of_the_streams_frees_everything(nixl_cluster: Any) -> None:
    def run(index: int) -> tuple[str, int]:
        def watch(stream: Any, tokens: int) -> None:
            if index % 2 and tokens >= 1 + index:
                stream.cancel()

        return nixl_cluster.run(
            watch,
            prompt=f"Story number {index}: once upon a time",
            sampling=pb.Sampling(temperature=0.0, max_tokens=96, ignore_eos=True),
        )

    with ThreadPoolExecutor(STREAMS) as pool:
        ended = list(pool.map(run, range(STREAMS)))
    assert ended[::2] == [("OK", 96)] * (STREAMS // 2)
    assert all(code == "CANCELLED" and tokens < 96 for code, tokens in ended[1::2])
    nixl_cluster.wait_idle()


def test_cancelling_at_once_frees_everything(nixl_cluster: Any) -> None:
    for delay_s in (0.0, 0.002, 0.01, 0.03, 0.1):
        stream = nixl_cluster.stream(
            token_ids=pb.TokenIds(ids=[1000] * 900), sampling=pb.Sampling(max_tokens=500, ignore_eos=True)
        )
        time.sleep(delay_s)
        stream.cancel()
    nixl_cluster.wait_idle()


def test_deadline_ends_the_stream_and_frees_everything(nixl_cluster: Any) -> None:
    with pytest.raises(grpc.RpcError) as ended:
        nixl_cluster.generate(
            prompt="Count to a thousand:", budget_ms=400, sampling=pb.Sampling(max_tokens=1500, ignore_eos=True)
        )
    assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    with pytest.raises(grpc.RpcError) as ended:
        nixl_cluster.generate(
            prompt="Count to a thousand:", timeout_s=0.4, sampling=pb.Sampling(max_tokens=1500, ignore_eos=True)
        )
    assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    nixl_cluster.wait_idle()


def test_the_ledger_sums_to_its_total_and_to_what_the_client_saw(nixl_cluster: Any) -> None:
    start_s = time.monotonic()
    answer = nixl_cluster.generate(
        token_ids=pb.TokenIds(ids=[1000] * 700),
        sampling=pb.Sampling(temperature=0.0, max_tokens=32, ignore_eos=True),
    )
    seen_s = time.monotonic() - start_s
    stages = {stage.name: stage.seconds for stage in answer.ledger.stages}
    assert list(stages) == [
        "admit",
        "queue",
        "prefill",
        "encode",
        "wire",
        "land",
        "wait",
        "decode",
        "recover",
        "deliver",
    ]
    assert sum(stages.values()) == pytest.approx(answer.ledger.total_s, rel=1e-6)
    assert 0 < answer.ledger.total_s <= seen_s
    assert stages["prefill"] > 0
    assert stages["decode"] > 0
    assert answer.ledger.transfer_bytes > 0
    assert answer.ledger.transport == "nixl"
    assert answer.usage.prompt_tokens == 700
    assert answer.usage.completion_tokens == 32


def test_stop_string_ends_the_stream_early(nixl_cluster: Any) -> None:
    free = nixl_cluster.generate(
        prompt="One, two, three, four, five,", sampling=pb.Sampling(temperature=0.0, max_tokens=40, ignore_eos=True)
    )
    stop = free.text[12:17]
    stopped = nixl_cluster.generate(
        prompt="One, two, three, four, five,",
        sampling=pb.Sampling(temperature=0.0, max_tokens=40, ignore_eos=True, stop=[stop]),
    )
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.finish == pb.FINISH_REASON_STOP
    nixl_cluster.wait_idle()
