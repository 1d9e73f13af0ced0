"""The HTTP front of a real cluster, through HAProxy: OpenAI's client, curl and Node, unmodified."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import openai
import pytest

from baton.wire import inference_pb2 as pb

if TYPE_CHECKING:
    from tests.e2e.conftest import Client

pytestmark = pytest.mark.ray

MODEL = "smollm2-135m-instruct"
QUESTION: list[Any] = [{"role": "user", "content": "Name three colours of the rainbow."}]
NODE = """
const [url, body] = process.argv.slice(1);
const response = await fetch(url, {method: "POST", headers: {"content-type": "application/json"}, body});
const decoder = new TextDecoder();
let text = "", rest = "";
for await (const part of response.body) {
  rest += decoder.decode(part, {stream: true});
  const events = rest.split("\\n\\n");
  rest = events.pop();
  for (const event of events) {
    const data = event.slice("data: ".length);
    if (data !== "[DONE]") text += JSON.parse(data).choices[0].delta.content ?? "";
  }
}
console.log(JSON.stringify({status: response.status, text}));
"""


@pytest.fixture
def client(tcp_cluster: Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{tcp_cluster.http}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_a_chat_is_the_same_whole_in_events_and_over_grpc(tcp_cluster: Client, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=24)
    events = list(
        client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            temperature=0,
            max_completion_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content=QUESTION[0]["content"])])
    grpc = tcp_cluster.generate(chat=chat, sampling=pb.Sampling(temperature=0, max_tokens=24))
    text = whole.choices[0].message.content
    assert text == grpc.text == "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert whole.usage is not None
    assert grpc.usage is not None
    assert whole.usage.total_tokens == grpc.usage.total_tokens == events[-1].usage.total_tokens  # type: ignore[union-attr]
    ledger = events[-1].model_dump()["baton"]["ledgers"][0]
    assert sum(ledger["stages"].values()) == pytest.approx(ledger["total_s"])
    assert ledger["transport"] == "tcp"
    tcp_cluster.wait_idle()


def test_outputs_of_one_request_are_those_of_single_requests(tcp_cluster: Client, client: openai.OpenAI) -> None:
    together = client.completions.create(model=MODEL, prompt="My favourite colour is", n=3, seed=5, max_tokens=8)
    for index, choice in enumerate(together.choices):
        alone = client.completions.create(model=MODEL, prompt="My favourite colour is", seed=5 + index, max_tokens=8)
        assert alone.choices[0].text == choice.text
    tcp_cluster.wait_idle()


def test_the_asynchronous_client_streams_side_by_side(tcp_cluster: Client) -> None:
    async def stream(client: openai.AsyncOpenAI, number: int) -> str:
        events = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"Say the number {number % 4}."}],
            temperature=0,
            max_tokens=12,
            stream=True,
        )
        return "".join([event.choices[0].delta.content or "" async for event in events])

    async def run() -> list[str]:
        url = f"http://{tcp_cluster.http}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(stream(client, number) for number in range(12)))

    texts = asyncio.run(run())
    assert texts[:4] == texts[4:8] == texts[8:]
    assert all(texts)
    tcp_cluster.wait_idle()


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=3)
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.APIStatusError) as late:
        client.chat.completions.create(model=MODEL, messages=QUESTION, extra_body={"baton": {"budget_ms": 1}})
    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        client.embeddings.create(model=MODEL, input="text")
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_stream_that_its_client_leaves_frees_everything(tcp_cluster: Client, client: openai.OpenAI) -> None:
    for _ in range(5):
        with client.completions.create(
            model=MODEL, prompt="Once upon a time", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        ) as events:
            next(iter(events))
    tcp_cluster.wait_idle(timeout_s=5.0)


def test_a_whole_answer_that_its_client_leaves_frees_everything(tcp_cluster: Client) -> None:
    host, port = tcp_cluster.http.split(":")
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        deadline_s = time.monotonic() + 20
        while not tcp_cluster.held():
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
    tcp_cluster.wait_idle(timeout_s=5.0)


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(tcp_cluster: Client) -> None:
    host, port = tcp_cluster.http.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99999999999\r\n\r\n" + b"x" * 4096
        )
        answer = ""
        while "request_too_large" not in answer:
            received = connection.recv(65536)
            assert received, answer
            answer += received.decode()
    assert answer.startswith("HTTP/1.1 413 ")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(tcp_cluster: Client) -> None:
    def curl(path: str, *options: str) -> str:
        command = ["curl", "--silent", "--fail-with-body", f"http://{tcp_cluster.http}{path}", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    body = json.dumps({"prompt": "One, two, three,", "max_tokens": 4, "temperature": 0, "stream": True})
    events = curl("/v1/completions", "--no-buffer", "-H", "Content-Type: application/json", "-d", body).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert json.loads(events[-3].removeprefix("data: "))["baton"]["ledgers"][0]["total_s"] > 0
    assert json.loads(curl("/health")) == {"ready": True}
    assert "baton_router_tokens_total" in curl("/metrics")
    assert json.loads(curl("/openapi.json"))["openapi"].startswith("3.1")
    ids = json.loads(curl("/tokenize", "-H", "Content-Type: application/json", "-d", '{"prompt": "Hi there"}'))[
        "tokens"
    ]
    back = curl("/detokenize", "-H", "Content-Type: application/json", "-d", json.dumps({"tokens": ids}))
    assert json.loads(back) == {"prompt": "Hi there"}


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_node_reads_the_events(tcp_cluster: Client, client: openai.OpenAI) -> None:
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 10, "stream": True}
    command = [
        "node",
        "--input-type=module",
        "-e",
        NODE,
        f"http://{tcp_cluster.http}/v1/chat/completions",
        json.dumps(body),
    ]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=10)
    assert answer == {"status": 200, "text": whole.choices[0].message.content}
