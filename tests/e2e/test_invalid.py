"""Every bad request gets the right code and the name of the field, and the next good one works."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from baton.wire import inference_pb2 as pb

pytestmark = pytest.mark.ray

NAN, INF = float("nan"), float("inf")


def sampled(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Hello", "sampling": pb.Sampling(**fields)}


def ids(*values: int) -> dict[str, Any]:
    return {"token_ids": pb.TokenIds(ids=values)}


def chat(role: str, content: str) -> dict[str, Any]:
    return {"chat": pb.Chat(messages=[pb.ChatMessage(role=role, content=content)])}


INVALID = [
    ("nothing", {}, "input"),
    ("empty prompt", {"prompt": ""}, "prompt"),
    ("empty ids", ids(), "token_ids"),
    ("empty chat", {"chat": pb.Chat()}, "chat"),
    ("unknown role", chat("wizard", "hi"), "chat.messages[0].role"),
    ("id out of range", ids(5, 10**6), "token_ids"),
    ("negative id", ids(-1), "token_ids"),
    ("prompt too long", {"prompt": "word " * 5000}, "prompt"),
    ("ids too long", ids(*([7] * 2048)), "token_ids"),
    ("prompt plus max_tokens too long", {**ids(*([7] * 2000)), "sampling": pb.Sampling(max_tokens=100)}, "max_tokens"),
    ("50 MB prompt", {"prompt": "x" * (50 << 20)}, ""),
    ("temperature NaN", sampled(temperature=NAN), "sampling.temperature"),
    ("temperature inf", sampled(temperature=INF), "sampling.temperature"),
    ("temperature negative", sampled(temperature=-0.1), "sampling.temperature"),
    ("top_p zero", sampled(top_p=0.0), "sampling.top_p"),
    ("top_p above one", sampled(top_p=1.1), "sampling.top_p"),
    ("top_k negative", sampled(top_k=-1), "sampling.top_k"),
    ("min_p NaN", sampled(min_p=NAN), "sampling.min_p"),
    ("repetition_penalty zero", sampled(repetition_penalty=0.0), "sampling.repetition_penalty"),
    ("presence_penalty", sampled(presence_penalty=3.0), "sampling.presence_penalty"),
    ("frequency_penalty", sampled(frequency_penalty=-3.0), "sampling.frequency_penalty"),
    ("seed negative", sampled(seed=-1), "sampling.seed"),
    ("max_tokens zero", sampled(max_tokens=0), "sampling.max_tokens"),
    ("max_tokens negative", sampled(max_tokens=-5), "sampling.max_tokens"),
    ("min_tokens above max", sampled(min_tokens=9, max_tokens=8), "sampling.min_tokens"),
    ("100 stop strings", sampled(stop=["x"] * 100), "sampling.stop"),
    ("empty stop string", sampled(stop=[""]), "sampling.stop"),
    ("long stop string", sampled(stop=["x" * 1000]), "sampling.stop"),
    ("stop id out of range", sampled(stop_token_ids=[10**6]), "sampling.stop_token_ids"),
    ("top_logprobs alone", sampled(top_logprobs=3), "sampling.top_logprobs"),
    ("top_logprobs large", sampled(logprobs=True, top_logprobs=99), "sampling.top_logprobs"),
    ("priority", {"prompt": "Hello", "priority": 1000}, "priority"),
    ("budget zero", {"prompt": "Hello", "budget_ms": 0}, "budget_ms"),
    ("unknown codec", {"prompt": "Hello", "handoff": pb.Handoff(codec="zip")}, "handoff.codec"),
    ("unknown floor", {"prompt": "Hello", "handoff": pb.Handoff(quality_floor="best")}, "handoff.quality_floor"),
    ("codec below own floor", {"prompt": "Hello", "handoff": pb.Handoff(codec="int8", quality_floor="exact")}, "codec"),
    ("bad request id", {"prompt": "Hello", "request_id": "a b"}, "request_id"),
]


def refusal(client: Any, fields: dict[str, Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as refused:
        client.generate(**fields)
    return refused.value


def test_every_invalid_request_is_named(nixl_cluster: Any) -> None:
    wrong = []
    for name, fields, field in INVALID:
        error = refusal(nixl_cluster, fields)
        # gRPC itself refuses what is far too large, before anything is parsed.
        wanted = "RESOURCE_EXHAUSTED" if name.startswith("50 MB") else "INVALID_ARGUMENT"
        if error.code().name != wanted or field not in error.details():
            wrong.append((name, error.code(), error.details()))
        if not name.startswith("50 MB") and not error.details():
            wrong.append((name, "no details", ""))
        good = nixl_cluster.generate(prompt="Hello", sampling=pb.Sampling(temperature=0.0, max_tokens=1))
        assert len(good.tokens) == 1, f"a valid request after {name!r} failed"
    assert not wrong
    nixl_cluster.wait_idle()


def test_unknown_model_is_not_found(nixl_cluster: Any) -> None:
    error = refusal(nixl_cluster, {"model": "gpt-17", "prompt": "Hello"})
    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert "model" in error.details()
    assert "smollm2-135m-instruct" in error.details()


def test_undecodable_bytes_are_refused(nixl_cluster: Any) -> None:
    call = nixl_cluster.channel.unary_stream("/baton.v1.Inference/Generate")
    for body in (b"\x12\x02\xff\xfe", b"\x12\xff"):  # a prompt that is no UTF-8, a message that is cut off
        with pytest.raises(grpc.RpcError) as refused:
            list(call(body, timeout=10))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "request" in refused.value.details()
    assert nixl_cluster.generate(prompt="Hello", sampling=pb.Sampling(max_tokens=1)).tokens


def test_lossy_codec_is_refused_where_the_deployment_does_not_allow_it(tcp_cluster: Any) -> None:
    error = refusal(tcp_cluster, {"prompt": "Hello", "handoff": pb.Handoff(codec="int8")})
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "handoff.codec" in error.details()
