"""What the HTTP front answers, on real workers: forms, errors, limits, and that clients who leave free everything."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from baton.errors import CONTEXT_LENGTH_EXCEEDED
from baton.ledger import STAGES
from engine.text import Tokenizer
from router.openai import app

if TYPE_CHECKING:
    from tests.unit.openai.conftest import Server

CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"
HI = [{"role": "user", "content": "Say hi"}]
STORY = {"prompt": "Once upon a time", "temperature": 0}


def post(http: httpx2.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    decoded: dict[str, Any] = answer.json()
    return decoded


def events(http: httpx2.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream that ends well."""
    with http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_chat_in_events_is_the_whole_one(http: httpx2.Client) -> None:
    asked = {"messages": HI, "temperature": 0, "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 2}
    whole, stream = post(http, CHAT, **asked), events(http, CHAT, **asked)
    choice = whole["choices"][0]
    assert (whole["object"], choice["finish_reason"]) == ("chat.completion", "length")
    assert whole["usage"]["completion_tokens"] == 9
    deltas = [event["choices"][0]["delta"] for event in stream]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]
    told = [event["choices"][0]["logprobs"] for event in stream]
    assert [token for each in told if each for token in each["content"]] == choice["logprobs"]["content"]
    assert [event["choices"][0]["finish_reason"] for event in stream[-2:]] == [None, "length"]
    assert all("usage" not in event for event in stream)
    assert ["baton" in event for event in stream] == [False] * (len(stream) - 1) + [True]


def test_usage_in_events_comes_last_and_only_if_asked_for(http: httpx2.Client) -> None:
    asked = {**STORY, "max_tokens": 4, "n": 2}
    stream = events(http, COMPLETE, **asked, stream_options={"include_usage": True})
    assert [event["usage"] for event in stream[:-1]] == [None] * (len(stream) - 1)
    assert (stream[-1]["choices"], stream[-1]["usage"]) == ([], post(http, COMPLETE, **asked)["usage"])
    assert stream[-1]["usage"]["completion_tokens"] == 8
    assert [ledger["index"] for ledger in stream[-1]["baton"]["ledgers"]] == [0, 1]


def test_the_ledger_sums_to_the_total(http: httpx2.Client) -> None:
    [ledger] = post(http, COMPLETE, **STORY, max_tokens=3)["baton"]["ledgers"]
    assert tuple(ledger["stages"]) == STAGES
    assert sum(ledger["stages"].values()) == pytest.approx(ledger["total_s"])
    assert (ledger["codec"], ledger["transport"]) == ("lossless", "loopback")


def test_several_outputs_compute_the_prompt_once(server: Server, http: httpx2.Client) -> None:
    """Each is the answer to a request of its own with the next seed."""
    prompt = [*range(1000, 1090)]
    before = server.run(_computed(server))
    together = post(http, COMPLETE, prompt=prompt, n=2, seed=11, max_tokens=6)
    computed = server.run(_computed(server)) - before
    assert computed == 90 + (90 - 80)  # five pages of 16 tokens come from the prefix cache
    alone = [post(http, COMPLETE, prompt=prompt, seed=11 + i, max_tokens=6)["choices"][0]["text"] for i in range(2)]
    assert [choice["text"] for choice in together["choices"]] == alone
    assert len(set(alone)) > 1
    assert together["usage"]["prompt_tokens"] == 90


async def _computed(server: Server) -> int:
    """Prompt tokens that the prefill worker has computed so far."""
    load = server.prefill._engine.load()
    return load.entered_tokens - load.hit_tokens


def test_several_prompts_are_answered_in_their_order(http: httpx2.Client) -> None:
    prompts = ["One, two, three,", "The capital of France is"]
    together = post(http, COMPLETE, prompt=prompts, temperature=0, max_tokens=5, n=2, echo=True)
    alone = [post(http, COMPLETE, prompt=each, temperature=0, max_tokens=5)["choices"][0]["text"] for each in prompts]
    texts = [prompts[at // 2] + alone[at // 2] for at in range(4)]
    assert [(choice["index"], choice["text"]) for choice in together["choices"]] == list(enumerate(texts))
    stream = events(http, COMPLETE, prompt=prompts, temperature=0, max_tokens=5, n=2, echo=True)
    streamed = [
        "".join(event["choices"][0]["text"] for event in stream if event["choices"][0]["index"] == at)
        for at in range(4)
    ]
    assert streamed == texts


def test_ids_are_a_prompt_too(http: httpx2.Client, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(STORY["prompt"])  # type: ignore[arg-type]
    by_ids = post(http, COMPLETE, prompt=ids, temperature=0, max_tokens=5, echo=True)["choices"][0]["text"]
    by_text = post(http, COMPLETE, **STORY, max_tokens=5)["choices"][0]["text"]
    assert by_ids == f"{STORY['prompt']}{by_text}"
    assert post(http, COMPLETE, prompt=[ids, ids], temperature=0, max_tokens=5)["choices"][1]["text"] == by_text
    assert len(post(http, COMPLETE, **STORY, ignore_eos=True, logprobs=0)["choices"][0]["logprobs"]["tokens"]) == 16


def test_logprobs_of_a_completion(http: httpx2.Client) -> None:
    told = post(http, COMPLETE, **STORY, max_tokens=6, logprobs=2)["choices"][0]
    logprobs = told["logprobs"]
    assert "".join(logprobs["tokens"]) == told["text"]
    assert logprobs["text_offset"][1] == len(logprobs["tokens"][0])
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob == max(top.values())
        assert len(top) == 2


def test_a_bias_bans_and_forces(http: httpx2.Client, tokenizer: Tokenizer) -> None:
    free = post(http, COMPLETE, **STORY, max_tokens=1, logprobs=0)["choices"][0]["logprobs"]["tokens"][0]
    [token] = tokenizer.encode(free)
    banned = post(http, COMPLETE, **STORY, max_tokens=1, logit_bias={str(token): -100})["choices"][0]["text"]
    assert banned != free
    [forced] = tokenizer.encode(" banana")[:1]
    text = post(http, COMPLETE, **STORY, max_tokens=2, logit_bias={str(forced): 100})["choices"][0]["text"]
    assert text == tokenizer.decode([forced, forced])


def test_stop_and_min_tokens(http: httpx2.Client) -> None:
    free = post(http, COMPLETE, **STORY, max_tokens=12)["choices"][0]["text"]
    stop = free[9:14]
    stopped = post(http, COMPLETE, **STORY, max_tokens=12, stop=stop)
    assert stopped["choices"][0]["text"] == free[: free.index(stop)]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    lasting = post(http, COMPLETE, **STORY, max_tokens=12, stop=[stop], min_tokens=12)
    assert lasting["choices"][0]["text"] == free


def test_what_clients_send_back_and_what_has_no_effect(http: httpx2.Client) -> None:
    answer = post(
        http,
        CHAT,
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "Hi", "name": "ann"},
            {"role": "assistant", "content": "Hello", "refusal": None, "annotations": [], "tool_calls": None},
            {"role": "user", "content": "And?"},
        ],
        max_tokens=2,
        user="u1",
        metadata={"a": "b"},
        store=False,
        tools=None,
        response_format={"type": "text"},
    )
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rest = [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "And?"}]
    count = post(http, "/tokenize", messages=[*system, *rest])["count"]
    assert answer["usage"]["prompt_tokens"] == count


ERRORS: list[tuple[str, dict[str, Any], int, str | None, str | None]] = [
    (CHAT, {}, 400, "messages", "missing_required_parameter"),
    (CHAT, {"messages": []}, 400, "messages", "invalid_value"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", "invalid_value"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "messages[0].content[0].type", None),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, 400, "tools", "invalid_value"),
    (CHAT, {"messages": HI, "functions": []}, 400, "functions", "unsupported_parameter"),
    (CHAT, {"messages": HI, "temprature": 1}, 400, "temprature", "unknown_parameter"),
    (CHAT, {"messages": HI, "max_tokens": "5"}, 400, "max_tokens", "invalid_value"),
    (CHAT, {"messages": HI, "max_tokens": 10**30}, 400, "max_tokens", "invalid_value"),
    (CHAT, {"messages": HI, "max_tokens": 500}, 400, "max_tokens", CONTEXT_LENGTH_EXCEEDED),
    (CHAT, {"messages": HI, "max_completion_tokens": 500}, 400, "max_completion_tokens", CONTEXT_LENGTH_EXCEEDED),
    (CHAT, {"messages": HI, "max_completion_tokens": 5, "max_tokens": 6}, 400, "max_tokens", None),
    (CHAT, {"messages": HI, "temperature": 0.001}, 400, "temperature", "invalid_value"),
    (CHAT, {"messages": HI, "top_logprobs": 3}, 400, "top_logprobs", "invalid_value"),
    (CHAT, {"messages": HI, "stream_options": {"include_usage": True}}, 400, "stream_options", None),
    (CHAT, {"messages": HI, "logit_bias": {"a": 1}}, 400, "logit_bias.a", "invalid_value"),
    (CHAT, {"messages": HI, "logit_bias": {"49999999": 1}}, 400, "logit_bias[49999999]", "invalid_value"),
    (CHAT, {"messages": HI, "logit_bias": {"5": 101}}, 400, "logit_bias.5", "invalid_value"),
    (CHAT, {"messages": HI, "n": 33}, 400, "n", "invalid_value"),
    (CHAT, {"messages": HI, "baton": {"codec": "zip"}}, 400, "baton.codec", "invalid_value"),
    (CHAT, {"messages": HI, "baton": {"budget_ms": 1}}, 504, "baton.budget_ms", "deadline_exceeded"),
    (CHAT, {"messages": HI, "model": "gpt-9"}, 404, "model", "model_not_found"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 900}]}, 400, "messages", CONTEXT_LENGTH_EXCEEDED),
    (COMPLETE, {}, 400, "prompt", "missing_required_parameter"),
    (COMPLETE, {"prompt": 5}, 400, "prompt", "invalid_value"),
    (COMPLETE, {"prompt": ["a", 5]}, 400, "prompt[1]", "invalid_value"),
    (COMPLETE, {"prompt": ["a", "b" * 30000]}, 400, "prompt[1]", CONTEXT_LENGTH_EXCEEDED),
    (COMPLETE, {"prompt": [1, 10**8]}, 400, "prompt[1]", "invalid_value"),
    (COMPLETE, {"prompt": ["a"] * 32, "n": 32}, 400, "n", None),
    (COMPLETE, {"prompt": "a", "n": 2, "best_of": 3}, 400, "best_of", None),
    (COMPLETE, {"prompt": "a", "echo": True, "logprobs": 1}, 400, "echo", None),
    (COMPLETE, {"prompt": "a", "suffix": "b"}, 400, "suffix", "unsupported_parameter"),
    (COMPLETE, {"prompt": "a", "logprobs": 21}, 400, "logprobs", "invalid_value"),
    (COMPLETE, {"prompt": "a", "min_tokens": 17}, 400, "min_tokens", "invalid_value"),
    ("/v1/embeddings", {"input": "a"}, 400, "model", "unsupported_endpoint"),
    ("/tokenize", {}, 400, "prompt", None),
    ("/detokenize", {"tokens": [10**8]}, 400, "tokens[0]", "invalid_value"),
    ("/v1/nothing", {}, 404, None, "unknown_url"),
]  # fmt: skip


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: f"{case[0]} {case[3]}")
def test_errors_name_the_parameter(
    http: httpx2.Client, case: tuple[str, dict[str, Any], int, str | None, str | None]
) -> None:
    path, body, status, param, code = case
    for stream in (False, True) if path in (CHAT, COMPLETE) and "stream_options" not in body else (False,):
        answer = http.post(path, json={**body, "stream": True} if stream else body)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param), error
        assert code is None or error["code"] == code
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]


@pytest.mark.parametrize(
    ("content", "media", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_json"),
        (b'{"prompt": "\\ud800"}', "application/json", 400, "invalid_json"),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", 400, "invalid_json"),
        (b"[" * 50000, "application/json", 400, "invalid_json"),
        (b"[]", "application/json", 400, "invalid_value"),
        (b'{"prompt": "a"}', "text/plain", 415, "unsupported_content_type"),
        (b'{"prompt": "%s"}' % (b"a" * 70000), "application/json", 413, "request_too_large"),
    ],
)
def test_bodies_that_are_none(http: httpx2.Client, content: bytes, media: str, status: int, code: str) -> None:
    answer = http.post(COMPLETE, content=content, headers={"content-type": media})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_body_of_unknown_length_is_limited_too(http: httpx2.Client) -> None:
    def endless() -> Any:
        for _ in range(100):
            yield b"a" * 4096

    answer = http.post(COMPLETE, content=endless(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_methods_that_a_path_has_not(http: httpx2.Client) -> None:
    answer = http.get(COMPLETE)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["code"] == "method_not_allowed"


def test_overload_says_when_to_come_back(server: Server, http: httpx2.Client) -> None:
    answer = http.post(COMPLETE, json={"prompt": ["a"] * 32, "n": 4, "max_tokens": 1})
    assert answer.status_code == 429
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("1", "500")


def test_a_client_that_leaves_frees_everything(server: Server, http: httpx2.Client) -> None:
    with pytest.raises(httpx2.ReadTimeout):
        http.post(COMPLETE, json={**STORY, "max_tokens": 400, "ignore_eos": True}, timeout=0.3)
    server.wait_idle()
    with http.stream("POST", COMPLETE, json={**STORY, "max_tokens": 400, "ignore_eos": True, "stream": True}) as answer:
        next(answer.iter_lines())
    server.wait_idle()


def test_a_client_that_leaves_in_the_middle_of_its_body(
    server: Server, http: httpx2.Client, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head + b'{"prompt"')
    assert post(http, COMPLETE, **STORY, max_tokens=1)["choices"]
    assert not caplog.records


def test_what_load_generators_send(http: httpx2.Client) -> None:
    """``vllm bench serve`` and ``guidellm``."""
    events(
        http,
        CHAT,
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        max_tokens=3,
        max_completion_tokens=3,
        temperature=0.0,
        repetition_penalty=1.0,
        logprobs=None,
        stop=None,
        ignore_eos=True,
        use_beam_search=False,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )


def test_a_failure_after_the_first_event_is_an_event(server: Server, http: httpx2.Client) -> None:
    body = {**STORY, "max_tokens": 400, "ignore_eos": True, "stream": True, "baton": {"budget_ms": 1000}}
    with http.stream("POST", COMPLETE, json=body) as answer:
        assert answer.status_code == 200
        last = [line for line in answer.iter_lines() if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"


def test_ids_of_requests(http: httpx2.Client) -> None:
    named = http.post(COMPLETE, json={**STORY, "max_tokens": 1}, headers={"x-request-id": "mine-7"}).json()
    assert (named["id"], named["baton"]["request_id"]) == ("cmpl-mine-7", "mine-7")
    other = http.post(COMPLETE, json={**STORY, "max_tokens": 1}, headers={"x-request-id": "no id"}).json()
    assert other["id"].startswith("cmpl-")
    assert "no id" not in other["id"]


def test_text_and_ids(http: httpx2.Client, tokenizer: Tokenizer) -> None:
    text = "Héllo 🙂 <|im_end|>"
    tokens = post(http, "/tokenize", prompt=text)
    assert tokens == {"count": len(tokenizer.encode(text)), "max_model_len": 512, "tokens": tokenizer.encode(text)}
    assert post(http, "/detokenize", tokens=tokens["tokens"]) == {"prompt": text}


def test_models_health_and_metrics(http: httpx2.Client) -> None:
    [model] = http.get("/v1/models").json()["data"]
    assert http.get(f"/v1/models/{model['id']}").json() == model
    assert http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert http.get("/health").json() == {"ready": True}
    before = _metric(http, 'baton_router_requests_total{outcome="completed",router="r"}')
    post(http, COMPLETE, **STORY, max_tokens=1)
    assert _metric(http, 'baton_router_requests_total{outcome="completed",router="r"}') == before + 1
    assert _metric(http, 'baton_worker_pages_total{router="r",role="decode",worker="d"}') == 256


def _metric(http: httpx2.Client, name: str) -> float:
    [value] = [line.split()[-1] for line in http.get("/metrics").text.splitlines() if line.startswith(name)]
    return float(value)


async def test_a_client_that_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "STALL_S", 0.05)
    closed = []

    async def endless() -> AsyncGenerator[str]:
        try:
            while True:
                yield "data: x\n\n"
        finally:
            closed.append(True)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # every buffer is full

    response = await app.EventStream.begun(endless())
    with pytest.raises(TimeoutError):
        await response({"type": "http"}, _never, send)
    assert closed == [True]


async def _never() -> Any:
    await asyncio.Event().wait()
