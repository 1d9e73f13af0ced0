"""What a request costs before it is let in: nothing, where a limit refuses it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from baton.api_keys import Caller, TenantLimits
from baton.config import parse
from baton.errors import InvalidRequest, Overloaded, Unavailable
from baton.wire import inference_pb2 as pb
from router import service as service_module
from router.openai.app import build
from router.service import InferenceService

CONFIG = parse({"model": {"dtype": "float32", "max_context": 512}, "router": {"max_inflight": 2, "recovery_s": 0.1}})
WRONG = pb.Sampling(temperature=9.0)  # whoever looks at it says so


@pytest.fixture
async def service(model_folder: Path) -> AsyncIterator[InferenceService]:
    """A router without workers."""
    service = InferenceService(CONFIG, model_folder, router_id="r")
    yield service
    await service.close()


def caller(requests_per_minute: int = 0, tokens_per_minute: int = 0) -> Caller:
    return Caller("acme", TenantLimits(requests_per_minute, tokens_per_minute))


async def ask(service: InferenceService, request: pb.GenerateRequest, who: Caller) -> None:
    async for _ in service.stream(request, arrived_s=time.monotonic(), caller=who):
        pass


async def test_the_rate_refuses_before_anything_is_parsed(service: InferenceService) -> None:
    who = caller(requests_per_minute=2)
    with pytest.raises(InvalidRequest):
        await ask(service, pb.GenerateRequest(prompt="x", sampling=WRONG), who)
    with pytest.raises(Unavailable):
        await ask(service, pb.GenerateRequest(prompt="x"), who)
    with pytest.raises(Overloaded, match="requests per minute"):
        await ask(service, pb.GenerateRequest(prompt="x", sampling=WRONG), who)
    counted = service.report().router
    assert (counted.refused, counted.failed, counted.inflight) == (2, 1, 0)
    assert dict(counted.refusals) == {"rate_limit_exceeded": 1}


async def test_tokens_are_charged_once_they_are_counted(service: InferenceService) -> None:
    who = caller(tokens_per_minute=10)
    for wanted in (Unavailable, Unavailable):  # what nobody computed is given back
        with pytest.raises(wanted):
            await ask(service, pb.GenerateRequest(prompt="x", sampling=pb.Sampling(max_tokens=5)), who)
    service._entry._limits.take_tokens("acme", 10, time.monotonic(), who.limits)
    with pytest.raises(Overloaded, match="tokens per minute"):
        await ask(service, pb.GenerateRequest(prompt="x"), who)


async def test_a_full_router_refuses_before_anything_is_parsed(service: InferenceService) -> None:
    with pytest.raises(Overloaded) as refused:
        await ask(service, pb.GenerateRequest(prompt="x", n=3, sampling=WRONG), caller())
    assert refused.value.reason == "inflight"
    assert service.observer.meters.rejections.sums == {("inflight",): 3}
    with pytest.raises(InvalidRequest, match="n"):
        await ask(service, pb.GenerateRequest(prompt="x", n=10**6), caller())
    assert service.report().router.inflight == 0


async def test_questions_count_against_the_tenants_rate(service: InferenceService) -> None:
    who = caller(requests_per_minute=2)
    ids = (await service.tokenize(pb.TokenizeRequest(prompt="Hi there"), who)).token_ids
    assert (await service.detokenize(pb.DetokenizeRequest(token_ids=ids), who)).text == "Hi there"
    for question in (
        service.tokenize(pb.TokenizeRequest(prompt="x"), who),
        service.detokenize(pb.DetokenizeRequest(token_ids=[1]), who),
    ):
        with pytest.raises(Overloaded) as refused:
            await question
        assert refused.value.reason == "rate_limit_exceeded"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
async def test_over_http_the_rate_refuses_before_the_body_is_read(model_folder: Path, path: str) -> None:
    service = InferenceService(CONFIG.with_flags({"admission.requests_per_minute": 1}), model_folder, router_id="r")
    await service.tokenize(pb.TokenizeRequest(prompt="x"))
    headers = [(b"content-type", b"application/json"), (b"content-length", b"4000000")]
    scope: dict[str, Any] = {
        "type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"", "root_path": "",
    }  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    await build(service)(scope, receive, send)
    assert sent[0]["status"] == 429
    assert json.loads(sent[1]["body"])["error"]["code"] == "rate_limit_exceeded"
    assert dict(service.report().router.refusals) == {"rate_limit_exceeded": 1}
    assert service.observer.meters.rejections.sums == {("rate_limit_exceeded",): 1}
    await service.close()


async def test_few_questions_are_answered_at_a_time(service: InferenceService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "MOST_QUESTIONS", 2)
    asked = [service.tokenize(pb.TokenizeRequest(prompt="one two three " * 200)) for _ in range(3)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(answer) for answer in answers] == [pb.TokenizeResponse, pb.TokenizeResponse, Overloaded]
    assert (await service.tokenize(pb.TokenizeRequest(prompt="x"))).token_ids
