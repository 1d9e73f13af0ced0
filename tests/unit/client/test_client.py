"""Both clients against a real gRPC server: answers, errors, retries, deadlines, cancellation, TLS."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import grpc
import pytest

import baton
from baton.client import AsyncClient, Client, Options, Retry
from baton.errors import DeadlineExceeded, Internal, InvalidRequest, Overloaded, Unavailable
from baton.request import FinishReason
from baton.wire import inference_pb2 as pb

BUSY = Overloaded("too much is waiting", retry_after_ms=100)


def test_a_whole_answer_has_everything(server: Any) -> None:
    with Client(server.address) as client:
        answer = client.generate("Say hello", max_tokens=2, temperature=0.0, stop=["x"], codec="raw", seed=0)
    assert (answer.text, answer.finish, answer.request_id, answer.model) == ("Hello", FinishReason.LENGTH, "r-1", "m")
    (output,) = answer.outputs
    assert output.token_ids == (1, 2)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 2)
    ledger = answer.ledger
    assert (ledger.total_s, ledger.stages, ledger.transfer_busy_s) == (0.5, {"decode": 0.5}, 0.25)
    assert (ledger.transfer_bytes, ledger.codec, ledger.transport) == (4096, "raw", "tcp")
    (request,) = server.service.requests
    assert (request.prompt, request.sampling.max_tokens, list(request.sampling.stop)) == ("Say hello", 2, ["x"])
    assert request.sampling.HasField("temperature")
    assert request.sampling.HasField("seed")
    assert not request.sampling.HasField("top_p")
    assert request.handoff.codec == "raw"
    assert 590_000 < request.budget_ms <= 600_000  # what is left of the default, so that workers know it


def test_a_stream_comes_in_parts(server: Any) -> None:
    with Client(server.address) as client:
        parts = list(client.stream_chat([("system", "be brief"), ("user", "hi")]))
    assert [(part.text, part.token_ids, part.finish) for part in parts] == [
        ("Hel", (1,), None), ("lo", (2,), None), ("", (), FinishReason.LENGTH),
    ]  # fmt: skip
    turns = server.service.requests[0].chat.messages
    assert [(turn.role, turn.content) for turn in turns] == [("system", "be brief"), ("user", "hi")]


def test_several_outputs_are_put_together(server: Any, responses: Any, last: Any) -> None:
    ends = [pb.GenerateResponse(index=index) for index in (0, 1)]
    for end in ends:
        end.MergeFrom(last)
    top = pb.TokenLogprob(
        token_id=7, text="B", raw=b"B", logprob=-0.5,
        top=[pb.TokenLogprob.Alternative(token_id=8, text="C", raw=b"C", logprob=-1.0)],
    )  # fmt: skip
    server.service.scripts = [
        [responses(7, "B", index=1, logprobs=[top]), responses(5, "A"), ends[1], responses(6, "a"), ends[0]]
    ]
    with Client(server.address) as client:
        answer = client.generate([1, 2, 3], n=2, logprobs=True, top_logprobs=1)
    assert [output.text for output in answer.outputs] == ["Aa", "B"]
    (logprob,) = answer.outputs[1].logprobs
    assert (logprob.text, logprob.logprob, logprob.raw) == ("B", -0.5, b"B")
    assert [(one.token_id, one.logprob) for one in logprob.top] == [(8, -1.0)]
    assert list(server.service.requests[0].token_ids.ids) == [1, 2, 3]


def test_the_other_methods(server: Any) -> None:
    with Client(server.address) as client:
        assert client.tokenize("a bcd") == [1, 3]
        assert client.tokenize([("user", "abcd")]) == [4]
        assert client.detokenize([4, 5]) == "4 5"
        (model,) = client.models()
        assert (model.id, model.max_context_tokens, model.eos_token_ids) == ("m", 2048, (1, 2))
        assert client.status().transport == "tcp"
        assert client.health()
        assert not client.health("tired")


def test_a_busy_server_is_asked_again_when_it_said(server: Any, responses: Any, last: Any) -> None:
    server.service.scripts = [[BUSY], [Unavailable("a worker is gone")], [responses(1, "Hi"), last]]
    with Client(server.address) as client:
        assert client.generate("x", timeout_s=30.0).text == "Hi"
    first, second, third = server.service.times_s
    assert 0.1 <= second - first < 1.0
    assert 0.2 <= third - second < 1.5
    budgets = [request.budget_ms for request in server.service.requests]
    assert budgets[0] > budgets[1] > budgets[2]


def test_nothing_is_repeated_once_a_token_was_delivered(server: Any, responses: Any) -> None:
    server.service.scripts = [[responses(1, "Hi"), Unavailable("a worker is gone", retry_after_ms=1)]]
    seen: list[str] = []
    with Client(server.address) as client, pytest.raises(Unavailable, match="a worker is gone"):
        seen.extend(part.text for part in client.stream("x"))
    assert seen == ["Hi"]
    assert len(server.service.requests) == 1


def test_attempts_end_and_the_error_tells_all(server: Any) -> None:
    server.service.scripts = [[BUSY]]
    with Client(server.address, retry=Retry(attempts=2)) as client, pytest.raises(Overloaded) as refused:
        client.generate("x")
    assert (refused.value.message, refused.value.retry_after_ms) == ("too much is waiting", 100)
    assert len(server.service.requests) == 2
    server.service.scripts = [[InvalidRequest("sampling.top_p", "is 2; allowed: (0, 1]", reason="too_large")]]
    with Client(server.address) as client, pytest.raises(InvalidRequest) as wrong:
        client.generate("x", top_p=2.0)
    assert (wrong.value.field, wrong.value.reason) == ("sampling.top_p", "too_large")
    assert wrong.value.message == "is 2; allowed: (0, 1]"
    assert len(server.service.requests) == 3


def test_a_deadline_ends_the_call(server: Any, responses: Any) -> None:
    server.service.scripts = [[responses(1, "Hi"), 1.0]]
    start_s = time.monotonic()
    with Client(server.address) as client, pytest.raises(DeadlineExceeded):
        client.generate("x", timeout_s=0.2)
    assert time.monotonic() - start_s < 0.9
    assert server.service.requests[0].budget_ms <= 200


def test_a_stream_that_stops_short_is_an_error(server: Any, responses: Any) -> None:
    server.service.scripts = [[responses(1, "Hi")]]
    with Client(server.address) as client, pytest.raises(Internal, match="without a finish reason"):
        client.generate("x")


def test_closing_a_stream_cancels_it(server: Any, responses: Any) -> None:
    server.service.scripts = [[responses(1, "Hi"), *[responses(2, "x")] * 10, 0.5]]
    with Client(server.address) as client:
        with closing(client.stream("x")) as parts:
            assert next(parts).text == "Hi"
        assert server.service.cancelled.wait(2.0)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda client: client.generate("x", max_tokens="many"), "sampling.max_tokens"),
        (lambda client: client.generate("x", max_tokens=2**40), "sampling.max_tokens"),
        (lambda client: client.generate("x", stop="one text"), "sampling.stop"),
        (lambda client: client.generate("x", codec=7), "handoff.codec"),
        (lambda client: client.generate("x", timeout_s=0.0), "timeout_s"),
        (lambda client: client.generate([1.5]), "token_ids"),
        (lambda client: client.generate("\ud800"), "prompt"),
        (lambda client: client.tokenize("\ud800"), "prompt"),
        (lambda client: client.chat([{"role": "user"}]), "chat.messages[0]"),
        (lambda client: client.detokenize(["a"]), "token_ids"),
    ],
)
def test_what_cannot_be_sent_is_named(server: Any, call: Callable[[Client], Any], field: str) -> None:
    with Client(server.address) as client, pytest.raises(InvalidRequest) as wrong:
        call(client)
    assert wrong.value.field == field
    assert not server.service.requests


def test_a_misspelt_option_is_a_type_error(server: Any) -> None:
    with Client(server.address) as client, pytest.raises(TypeError, match="max_token"):
        client.generate("x", max_token=3)  # type: ignore[call-arg]


def test_every_option_is_a_field_of_the_contract() -> None:
    fields = {
        *pb.GenerateRequest.DESCRIPTOR.fields_by_name,
        *pb.Sampling.DESCRIPTOR.fields_by_name,
        *pb.Handoff.DESCRIPTOR.fields_by_name,
        "timeout_s",
    }
    messages = {"prompt", "token_ids", "chat", "sampling", "handoff", "budget_ms"}
    assert set(Options.__annotations__) == fields - messages


def test_both_clients_have_the_same_methods() -> None:
    def methods(client: type[Any]) -> dict[str, list[str]]:
        public = inspect.getmembers(client, inspect.isfunction)
        return {name: list(inspect.signature(one).parameters) for name, one in public if not name.startswith("_")}

    assert methods(Client) == methods(AsyncClient)
    assert inspect.signature(Client.__init__) == inspect.signature(AsyncClient.__init__)


async def test_the_asynchronous_client_does_the_same(server: Any, responses: Any, last: Any) -> None:
    async with AsyncClient(server.address) as client:
        parts = [part.text async for part in client.stream("x")]
        assert parts == ["Hel", "lo", ""]
        assert [part.text async for part in client.stream_chat([("user", "x")])] == parts
        assert (await client.chat([("user", "x")])).text == (await client.generate("x")).text == "Hello"
        assert await client.tokenize("a bcd") == [1, 3]
        assert await client.detokenize([4]) == "4"
        assert (await client.models())[0].id == (await client.status()).model == "m"
        assert await client.health()
        server.service.scripts = [[BUSY], [responses(1, "Hi"), last]]
        assert (await client.generate("x")).text == "Hi"
        server.service.scripts = [[InvalidRequest("prompt", "is empty")]]
        with pytest.raises(InvalidRequest, match="prompt: is empty"):
            await client.generate("x")
    async with AsyncClient(server.address, retry=Retry(attempts=1)) as client:
        with pytest.raises(Internal):
            await client._unary(client._channel.unary_unary("/baton.v1.Inference/Nothing"), b"")


async def test_leaving_an_asynchronous_stream_cancels_it(server: Any, responses: Any) -> None:
    server.service.scripts = [[responses(1, "Hi"), *[responses(2, "x")] * 10, 0.5]]
    async with AsyncClient(server.address) as client:
        async with aclosing(client.stream("x")) as parts:
            assert (await anext(parts)).text == "Hi"
        assert await asyncio.to_thread(server.service.cancelled.wait, 2.0)
        server.service.cancelled.clear()
        task = asyncio.create_task(client.generate("x"))
        while len(server.service.requests) < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.service.cancelled.wait, 2.0)


def test_the_client_imports_neither_torch_nor_ray() -> None:
    code = "import sys, baton.client; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    root = Path(baton.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(eval(done.stdout))
    assert "grpc" in loaded
    assert not loaded & {"torch", "ray", "numpy", "transformers", "pydantic", "router", "engine", "deploy"}
    assert grpc.__name__ in loaded
