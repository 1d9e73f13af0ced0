"""Every limit of the contract: the value just inside passes, the one outside names its field and what is allowed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from baton.config import Config
from baton.config_admission import AdmissionConfig
from baton.config_handoff import CODECS, LOSS
from baton.errors import BatonError, DeadlineExceeded, InvalidRequest, NotFound
from baton.request import Sampling
from baton.wire import inference_pb2 as pb
from engine.text import Tokenizer
from router import validate
from router.validate import Limits, ParsedRequest

Parsed = Callable[..., ParsedRequest]


def sampling(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="hello world", sampling=pb.Sampling(**fields))


def chat(*messages: tuple[str, str]) -> pb.GenerateRequest:
    turns = [pb.ChatMessage(role=role, content=content) for role, content in messages]
    return pb.GenerateRequest(chat=pb.Chat(messages=turns))


def ids(*tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=tokens))


def refusal(parsed: Parsed, request: pb.GenerateRequest, **options: Any) -> BatonError:
    with pytest.raises(BatonError) as caught:
        parsed(request, **options)
    return caught.value


# ---- defaults and values that pass


def test_defaults(parsed: Parsed, tokenizer: Tokenizer) -> None:
    request = parsed(pb.GenerateRequest(prompt="hello world"))
    assert request.prompt == tuple(tokenizer.encode("hello world"))
    assert request.sampling == Sampling(
        temperature=1.0, seed=7, max_tokens=64 - len(request.prompt), eos_token_ids=tokenizer.eos_token_ids
    )
    assert (request.stop, request.priority, request.budget_s, request.codec) == ((), 0, 600.0, "lossless")


def test_every_value_arrives(parsed: Parsed) -> None:
    request = pb.GenerateRequest(
        model="smollm2-135m-instruct",
        token_ids=pb.TokenIds(ids=[5, 49151, 0]),
        sampling=pb.Sampling(
            temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1, presence_penalty=-0.5,
            frequency_penalty=0.25, seed=(1 << 63) - 1, max_tokens=61, min_tokens=61, stop=["\n\n", "END"],
            stop_token_ids=[7, 8], ignore_eos=True, logprobs=True, top_logprobs=20,
        ),
        priority=-3,
        budget_ms=1500,
        handoff=pb.Handoff(codec="raw", quality_floor="exact"),
        request_id="abc-1.2:3_X",
        slo_class="interactive",
    )  # fmt: skip
    assert parsed(request) == ParsedRequest(
        request_id="abc-1.2:3_X",
        prompt=(5, 49151, 0),
        sampling=Sampling(
            temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1, presence_penalty=-0.5,
            frequency_penalty=0.25, seed=(1 << 63) - 1, max_tokens=61, min_tokens=61, stop_token_ids=(7, 8),
            eos_token_ids=(), logprobs=True, top_logprobs=20,
        ),
        stop=("\n\n", "END"),
        priority=7,
        budget_s=1.5,
        codec="raw",
        slo_class="interactive",
        slo=AdmissionConfig().classes["interactive"],
    )  # fmt: skip


def test_zero_temperature_and_seed_are_not_unset(parsed: Parsed) -> None:
    assert parsed(sampling(temperature=0, seed=0)).sampling.temperature == 0
    assert parsed(sampling(temperature=0, seed=0)).sampling.seed == 0


def test_chat_is_rendered_for_the_assistant(parsed: Parsed, tokenizer: Tokenizer) -> None:
    assert parsed(chat(("user", "hi"))).prompt == tuple(tokenizer.chat([("user", "hi")]))


def test_request_ids_of_requests_without_one_differ(parsed: Parsed) -> None:
    request = pb.GenerateRequest(prompt="hi")
    first, second = (parsed(request, seed=seed).request_id for seed in (1, (1 << 63) - 1))
    assert first != second
    assert validate.REQUEST_ID.fullmatch(first)


def test_work_is_what_workers_need(parsed: Parsed) -> None:
    request = parsed(sampling(max_tokens=3))
    work = request.work("router-1")
    assert (work.request_id, work.prompt, work.sampling) == ("router-1", request.prompt, request.sampling)
    assert (work.priority, work.budget_s) == (0, 600.0)


def test_limits_of_a_configuration() -> None:
    assert Limits.of(Config(), context_tokens=100) == Limits(
        "smollm2-135m-instruct", 100, 4 << 20, 600.0, "auto", "exact"
    )


INSIDE = [
    sampling(temperature=0.01), sampling(temperature=2), sampling(top_p=1e-9), sampling(top_p=1),
    sampling(top_k=49152), sampling(min_p=1), sampling(repetition_penalty=0.01), sampling(repetition_penalty=2),
    sampling(presence_penalty=-2), sampling(presence_penalty=2), sampling(frequency_penalty=-2),
    sampling(frequency_penalty=2), sampling(max_tokens=62), sampling(max_tokens=1),
    sampling(stop=["x" * 256] * 16), sampling(stop_token_ids=[0] * 64), sampling(logprobs=True, top_logprobs=20),
    pb.GenerateRequest(prompt="x", priority=100), pb.GenerateRequest(prompt="x", priority=-100),
    pb.GenerateRequest(prompt="x", budget_ms=1), pb.GenerateRequest(prompt="x", request_id="a" * 128),
    ids(*[1] * 63), ids(0), ids(49151), chat(("tool", "4"), ("user", "")),
]  # fmt: skip


@pytest.mark.parametrize("request_", INSIDE, ids=lambda request: str(request).replace("\n", " ")[:60])
def test_values_at_the_limit_pass(parsed: Parsed, request_: pb.GenerateRequest) -> None:
    assert isinstance(parsed(request_), ParsedRequest)


# ---- values that are refused

OUTSIDE: list[tuple[pb.GenerateRequest, str, str]] = [
    (sampling(temperature=-0.1), "sampling.temperature", "is -0.1; allowed: 0 or [0.01, 2]"),
    (sampling(temperature=1e-300), "sampling.temperature", "is 1e-300; allowed: 0 or [0.01, 2]"),
    (sampling(temperature=2.1), "sampling.temperature", "is 2.1; allowed: 0 or [0.01, 2]"),
    (sampling(top_p=0), "sampling.top_p", "is 0.0; allowed: (0, 1]"),
    (sampling(top_p=1.01), "sampling.top_p", "is 1.01; allowed: (0, 1]"),
    (sampling(top_k=-1), "sampling.top_k", "is -1; allowed: [0, 49152]"),
    (sampling(top_k=49153), "sampling.top_k", "is 49153; allowed: [0, 49152]"),
    (sampling(min_p=-0.01), "sampling.min_p", "is -0.01; allowed: [0, 1]"),
    (sampling(min_p=1.5), "sampling.min_p", "is 1.5; allowed: [0, 1]"),
    (sampling(repetition_penalty=0), "sampling.repetition_penalty", "is 0.0; allowed: [0.01, 2]"),
    (sampling(repetition_penalty=3), "sampling.repetition_penalty", "is 3.0; allowed: [0.01, 2]"),
    (sampling(presence_penalty=-2.5), "sampling.presence_penalty", "is -2.5; allowed: [-2, 2]"),
    (sampling(frequency_penalty=2.5), "sampling.frequency_penalty", "is 2.5; allowed: [-2, 2]"),
    (sampling(seed=-1), "sampling.seed", "is -1; allowed: [0, 2^63)"),
    (sampling(max_tokens=0), "sampling.max_tokens", "is 0; must be at least 1"),
    (sampling(max_tokens=-5), "sampling.max_tokens", "is -5; must be at least 1"),
    (
        sampling(max_tokens=63),
        "sampling.max_tokens",
        "is 63; the context has 64 tokens and the input takes 2, so at most 62 are allowed",
    ),
    (sampling(min_tokens=-1), "sampling.min_tokens", "is -1; allowed: [0, 62]"),
    (sampling(min_tokens=5, max_tokens=4), "sampling.min_tokens", "is 5; allowed: [0, 4]"),
    (sampling(stop=["x"] * 100), "sampling.stop", "has 100 strings; allowed: [0, 16]"),
    (sampling(stop=["x", ""]), "sampling.stop[1]", "is 0 characters long; allowed: [1, 256]"),
    (sampling(stop=["x" * 257]), "sampling.stop[0]", "is 257 characters long; allowed: [1, 256]"),
    (sampling(stop_token_ids=[0] * 65), "sampling.stop_token_ids", "has 65 ids; allowed: [0, 64]"),
    (sampling(stop_token_ids=[1, 49152]), "sampling.stop_token_ids[1]", "is 49152; the vocabulary is [0, 49152)"),
    (sampling(stop_token_ids=[-1]), "sampling.stop_token_ids[0]", "is -1; the vocabulary is [0, 49152)"),
    (sampling(logprobs=True, top_logprobs=21), "sampling.top_logprobs", "is 21; allowed: [0, 20]"),
    (sampling(logprobs=True, top_logprobs=-1), "sampling.top_logprobs", "is -1; allowed: [0, 20]"),
    (sampling(top_logprobs=3), "sampling.top_logprobs", "is 3, but sampling.logprobs is not set"),
    (pb.GenerateRequest(), "input", "is missing; set prompt, token_ids or chat"),
    (pb.GenerateRequest(prompt=""), "prompt", "is empty; at least one token is needed"),
    (ids(), "token_ids.ids", "is empty; at least one token is needed"),
    (ids(1, -1), "token_ids.ids[1]", "is -1; the vocabulary is [0, 49152)"),
    (ids(1, 2, 49152), "token_ids.ids[2]", "is 49152; the vocabulary is [0, 49152)"),
    (chat(), "chat.messages", "has 0 messages; allowed: [1, 1024]"),
    (chat(*[("user", "")] * 1025), "chat.messages", "has 1025 messages; allowed: [1, 1024]"),
    (
        chat(("user", "a"), ("assistant", "b"), ("robot", "c")),
        "chat.messages[2].role",
        "is 'robot'; allowed: system, user, assistant, tool",
    ),
    (chat(("", "a")), "chat.messages[0].role", "is ''; allowed: system, user, assistant, tool"),
    (pb.GenerateRequest(prompt="x", priority=101), "priority", "is 101; allowed: [-100, 100]"),
    (pb.GenerateRequest(prompt="x", budget_ms=0), "budget_ms", "is 0; must be at least 1"),
    (pb.GenerateRequest(prompt="x", budget_ms=-9), "budget_ms", "is -9; must be at least 1"),
    (pb.GenerateRequest(prompt="x", model="m" * 257), "model", "is 257 characters long; at most 256 are allowed"),
    (
        pb.GenerateRequest(prompt="x", handoff=pb.Handoff(codec="zip")),
        "handoff.codec",
        f"unknown codec 'zip'; known: auto, {', '.join(CODECS)}",
    ),
    (
        pb.GenerateRequest(prompt="x", handoff=pb.Handoff(quality_floor="poor")),
        "handoff.quality_floor",
        "unknown floor 'poor'; known: exact, int8, int6, fp8, int4, int3, int2",
    ),
    (
        pb.GenerateRequest(prompt="x", handoff=pb.Handoff(codec="int8")),
        "handoff.codec",
        "'int8' is below the deployment's quality floor 'exact'; allowed: auto, raw, lossless",
    ),
]


@pytest.mark.parametrize(("request_", "field", "message"), OUTSIDE, ids=[f"{f}-{m[:24]}" for _, f, m in OUTSIDE])
def test_values_outside_the_limits_name_field_value_and_range(
    parsed: Parsed, request_: pb.GenerateRequest, field: str, message: str
) -> None:
    error = refusal(parsed, request_)
    assert isinstance(error, InvalidRequest)
    assert (error.field, error.message) == (field, message)


FLOATS = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_field_takes_nan_or_infinity(parsed: Parsed, name: str, value: float) -> None:
    error = refusal(parsed, sampling(**{name: value}))
    assert isinstance(error, InvalidRequest)
    assert error.field == f"sampling.{name}"
    assert f"is {value};" in error.message


@pytest.mark.parametrize("request_id", ["", "a b", "x" * 129, "naïve", "line\n", "../etc"])
def test_request_ids_are_plain(parsed: Parsed, request_id: str) -> None:
    assert refusal(parsed, pb.GenerateRequest(prompt="x", request_id=request_id)).field == "request_id"


def test_unknown_model_is_not_found(parsed: Parsed) -> None:
    error = refusal(parsed, pb.GenerateRequest(prompt="x", model="gpt-" + "9" * 200))
    assert isinstance(error, NotFound)
    assert error.field == "model"
    assert "smollm2-135m-instruct" in error.message
    assert len(error.message) < 150


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(prompt="hello " * 64), "prompt"),
        (ids(*[1] * 64), "token_ids.ids"),
        (chat(("user", "hello " * 50)), "chat"),
    ],
)
def test_input_too_long_states_both_numbers(
    parsed: Parsed, tokenizer: Tokenizer, request_: pb.GenerateRequest, field: str
) -> None:
    error = refusal(parsed, request_)
    assert error.field == field
    match field:
        case "prompt":
            tokens = len(tokenizer.encode(request_.prompt))
        case "chat":
            tokens = len(tokenizer.chat([("user", "hello " * 50)]))
        case _:
            tokens = 64
    assert error.message == (
        f"is {tokens} tokens long; the context has 64 and one of them must be left for the output, "
        "so at most 63 are allowed"
    )


# ---- bounded work


@pytest.fixture
def no_tokenizing(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> list[int]:
        raise AssertionError("tokenized")

    monkeypatch.setattr(tokenizer, "encode", fail)
    monkeypatch.setattr(tokenizer, "chat", fail)


@pytest.mark.usefixtures("no_tokenizing")
def test_an_oversized_request_is_refused_by_its_size(parsed: Parsed, limits: Limits) -> None:
    request = pb.GenerateRequest(prompt="x" * 50_000_000, model="unknown")
    error = refusal(parsed, request)
    assert (error.field, error.code) == ("request", "INVALID_ARGUMENT")
    assert error.message == f"is {request.ByteSize()} bytes; at most {limits.max_request_bytes} are accepted"


@pytest.mark.usefixtures("no_tokenizing")
@pytest.mark.parametrize("field", ["prompt", "chat.messages"])
def test_hopeless_text_is_refused_before_tokenizing(parsed: Parsed, tokenizer: Tokenizer, field: str) -> None:
    most = 64 * tokenizer.max_token_chars
    half = "x" * (most // 2 + 1)
    request = pb.GenerateRequest(prompt=half * 2) if field == "prompt" else chat(("user", half), ("user", half))
    error = refusal(parsed, request)
    assert error.field == field
    assert f"is {2 * len(half)} characters long" in error.message
    assert f"holds at most {most}" in error.message


@pytest.mark.usefixtures("no_tokenizing")
def test_everything_else_is_checked_before_tokenizing(parsed: Parsed) -> None:
    assert refusal(parsed, sampling(temperature=9)).field == "sampling.temperature"


def test_text_that_just_might_fit_is_tokenized(parsed: Parsed, tokenizer: Tokenizer) -> None:
    longest = max(range(tokenizer.vocab_size), key=lambda token: len(tokenizer.token_text(token)))
    text = tokenizer.token_text(longest) * 3
    assert len(parsed(pb.GenerateRequest(prompt=text)).prompt) <= 63


# ---- time


@pytest.mark.parametrize(
    ("budget_ms", "remaining_s", "expected_s"),
    [(None, None, 600.0), (500, None, 0.5), (500, 0.25, 0.25), (None, 3.0, 3.0), (10**9, None, 600.0), (1, 1e9, 0.001)],
)
def test_the_shortest_time_holds(
    parsed: Parsed, budget_ms: int | None, remaining_s: float | None, expected_s: float
) -> None:
    request = pb.GenerateRequest(prompt="x", budget_ms=budget_ms)
    assert parsed(request, remaining_s=remaining_s).budget_s == expected_s


@pytest.mark.parametrize("remaining_s", [0.0, -1.0])
def test_a_deadline_in_the_past(parsed: Parsed, remaining_s: float) -> None:
    assert isinstance(refusal(parsed, pb.GenerateRequest(prompt="x"), remaining_s=remaining_s), DeadlineExceeded)


# ---- codec


@pytest.mark.parametrize(
    ("deployed", "asked", "used"),  # (codec, quality floor) each
    [
        (("lossless", "exact"), ("", ""), "lossless"),
        (("raw", "exact"), ("", ""), "raw"),
        (("raw", "exact"), ("lossless", "exact"), "lossless"),
        (("lossless", "exact"), ("", "int8"), "lossless"),
        (("int8", "int8"), ("", ""), "int8"),
        (("int8", "int8"), ("", "exact"), "lossless"),
        (("lossless", "int8"), ("int8", ""), "int8"),
        (("lossless", "int8"), ("int8", "int8"), "int8"),
        (("auto", "exact"), ("", ""), "auto"),
        (("auto", "int8"), ("", "exact"), "auto"),
        (("auto", "exact"), ("raw", ""), "raw"),
        (("raw", "exact"), ("auto", ""), "auto"),
    ],
)
def test_codec_and_quality_floor(
    parsed: Parsed, limits: Limits, deployed: tuple[str, str], asked: tuple[str, str], used: str
) -> None:
    limits = dataclasses.replace(limits, codec=deployed[0], quality_floor=deployed[1])
    request = pb.GenerateRequest(prompt="x", handoff=pb.Handoff(codec=asked[0], quality_floor=asked[1]))
    assert parsed(request, limits).codec == used


@pytest.mark.parametrize(
    ("deployed_floor", "asked_floor", "whose"),
    [("exact", "int8", "deployment's"), ("exact", "exact", "deployment's"), ("int8", "exact", "request's")],
)
def test_a_codec_below_a_floor_is_refused(
    parsed: Parsed, limits: Limits, deployed_floor: str, asked_floor: str, whose: str
) -> None:
    limits = dataclasses.replace(limits, quality_floor=deployed_floor)
    request = pb.GenerateRequest(prompt="x", handoff=pb.Handoff(codec="int8", quality_floor=asked_floor))
    error = refusal(parsed, request, limits=limits)
    assert error.field == "handoff.codec"
    assert error.message == f"'int8' is below the {whose} quality floor 'exact'; allowed: auto, raw, lossless"


@pytest.mark.parametrize(
    ("deployed", "asked", "used"),
    [("exact", "", "exact"), ("exact", "int4", "exact"), ("int4", "int8", "int8"), ("int4", "int2", "int4")],
)
def test_the_stricter_floor_travels_with_the_request(
    parsed: Parsed, limits: Limits, deployed: str, asked: str, used: str
) -> None:
    limits = dataclasses.replace(limits, codec="auto", quality_floor=deployed)
    request = pb.GenerateRequest(prompt="x", handoff=pb.Handoff(quality_floor=asked))
    assert parsed(request, limits).floor == used


def test_every_configured_codec_has_a_known_loss() -> None:
    assert set(LOSS) == set(CODECS)


# ---- Tokenize


def test_tokenize_gives_what_generate_computes(tokenizer: Tokenizer, limits: Limits, parsed: Parsed) -> None:
    text = pb.TokenizeRequest(prompt="hello world")
    assert validate.tokenize(text, limits, tokenizer) == list(parsed(sampling()).prompt)
    turns = pb.TokenizeRequest(chat=chat(("user", "hi")).chat)
    assert validate.tokenize(turns, limits, tokenizer) == list(parsed(chat(("user", "hi"))).prompt)


def test_tokenize_takes_empty_text_and_more_than_the_context(tokenizer: Tokenizer, limits: Limits) -> None:
    assert validate.tokenize(pb.TokenizeRequest(prompt=""), limits, tokenizer) == []
    assert len(validate.tokenize(pb.TokenizeRequest(prompt="hello " * 100), limits, tokenizer)) > limits.context_tokens


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.TokenizeRequest(), "input"),
        (pb.TokenizeRequest(model="other", prompt="x"), "model"),
        (pb.TokenizeRequest(prompt="x" * 100_000), "prompt"),
        (pb.TokenizeRequest(prompt="x" * (1 << 20)), "request"),
        (pb.TokenizeRequest(chat=pb.Chat()), "chat.messages"),
    ],
)
def test_tokenize_refuses(tokenizer: Tokenizer, limits: Limits, request_: pb.TokenizeRequest, field: str) -> None:
    with pytest.raises(BatonError) as caught:
        validate.tokenize(request_, limits, tokenizer)
    assert caught.value.field == field


# ---- classes of service


def test_a_request_has_a_class_and_its_priority_counts(parsed: Parsed) -> None:
    named = {name: parsed(pb.GenerateRequest(prompt="x", slo_class=name, priority=3)) for name in ("", "interactive")}
    assert [(one.slo_class, one.priority) for one in named.values()] == [("standard", 3), ("interactive", 13)]
    assert named["interactive"].slo.ttft_ms > 0
    assert parsed(pb.GenerateRequest(prompt="x", slo_class="flex")).slo_class == "batch"  # as OpenAI's clients call it
    assert parsed(pb.GenerateRequest(prompt="x", slo_class="batch", priority=-100)).priority == -100


def test_an_unknown_class_is_refused_with_the_known_ones(parsed: Parsed) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parsed(pb.GenerateRequest(prompt="x", slo_class="gold"))
    assert refused.value.field == "slo_class"
    assert refused.value.message == "unknown class 'gold'; known: interactive, standard, batch"
