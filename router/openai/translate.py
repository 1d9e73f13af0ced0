"""Requests of OpenAI's form as requests of the gRPC contract, which alone is validated further. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from baton.wire import inference_pb2 as pb
from router.openai.errors import HttpError
from router.openai.requests import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingBody,
    TokenizeRequest,
)
from router.validate import SEEDS

MAX_CHOICES = 128  # of one request
COMPLETION_TOKENS = 16  # OpenAI's default for completions; chats take what the context leaves
CHAT_NAMES = {"chat.messages": "messages", "chat": "messages"}
IDS_NAMES = {"token_ids": "tokens"}  # of a detokenize request
OPTIONS = {
    "priority": "baton.priority",
    "budget_ms": "baton.budget_ms",
    "handoff": "baton",
    "slo_class": "baton.slo_class",
}
NO_TIERS = ("auto", "default")  # service tiers that leave the class to the deployment


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt. ``renamed``: the client's names for fields of the contract, for errors; others keep the name that
    they have below ``sampling``."""

    request: pb.GenerateRequest
    renamed: Mapping[str, str]


def chat(body: ChatRequest, request_id: str) -> Job:
    """Raises :class:`HttpError` where fields contradict each other."""
    _check(body)
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise HttpError(400, "max_tokens: is another name of max_completion_tokens, which differs", param="max_tokens")
    sampling = _sampling(body)
    if body.max_completion_tokens is not None:
        sampling.max_tokens = body.max_completion_tokens
    sampling.logprobs = bool(body.logprobs)
    sampling.top_logprobs = body.top_logprobs or 0
    request = _request(body, sampling, request_id)
    request.chat.CopyFrom(conversation(body.messages))
    tier = {}
    if body.service_tier and body.service_tier not in NO_TIERS and not request.slo_class:
        request.slo_class, tier = body.service_tier, {"slo_class": "service_tier"}
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return Job(request, OPTIONS | CHAT_NAMES | tier | {"sampling.max_tokens": limit})


def completions(body: CompletionRequest, request_id: str) -> list[Job]:
    """One job for each prompt. Raises as :func:`chat` does."""
    _check(body)
    prompts = _prompts(body)
    if len(prompts) * (body.n or 1) > MAX_CHOICES:
        raise HttpError(400, f"n: prompts times n make more than {MAX_CHOICES} choices", param="n")
    if body.best_of not in (None, body.n or 1):
        raise HttpError(400, "best_of: must be the same as n: nothing is thrown away here", param="best_of")
    if body.echo and body.logprobs is not None:
        raise HttpError(400, "echo: log-probabilities of the prompt are not computed here", param="echo")
    sampling = _sampling(body)
    if body.max_tokens is None:
        sampling.max_tokens = COMPLETION_TOKENS
    sampling.logprobs = body.logprobs is not None
    sampling.top_logprobs = body.logprobs or 0
    jobs = []
    for index, prompt in enumerate(prompts):
        request = _request(body, sampling, request_id)
        name = f"prompt[{index}]" if len(prompts) > 1 else "prompt"
        if isinstance(prompt, str):
            request.prompt = prompt
        else:
            request.token_ids.ids.extend(prompt)
        jobs.append(
            Job(request, OPTIONS | {"prompt": name, "token_ids.ids": name, "sampling.top_logprobs": "logprobs"})
        )
    return jobs


def tokenize(body: TokenizeRequest) -> pb.TokenizeRequest:
    """Raises :class:`HttpError` unless exactly one of prompt and messages is there."""
    if (body.prompt is None) == (body.messages is None):
        raise HttpError(400, "prompt: set either prompt or messages", param="prompt")
    request = pb.TokenizeRequest(model=body.model or "")
    if body.messages is None:
        request.prompt = body.prompt or ""
    else:
        request.chat.CopyFrom(conversation(body.messages))
    return request


def detokenize(body: DetokenizeRequest) -> pb.DetokenizeRequest:
    return pb.DetokenizeRequest(model=body.model or "", token_ids=body.tokens)


def conversation(messages: list[ChatMessage]) -> pb.Chat:
    """Text parts of one message are joined; a developer speaks as the system, which is what templates know."""
    chat = pb.Chat()
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        content = message.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        chat.messages.add(role=role, content=text)
    return chat


def _check(body: SamplingBody) -> None:
    if body.use_beam_search:
        raise HttpError(
            400, "use_beam_search is not supported here.", param="use_beam_search", code="unsupported_parameter"
        )
    if body.stream_options is not None and not body.stream:
        raise HttpError(400, "stream_options: needs stream", param="stream_options")


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    match body.prompt:
        case str() as text:
            return [text]
        case [int(), *_] as ids:
            return [ids]  # type: ignore[list-item]  # its first element tells which list it is
        case several:
            return list(several)  # type: ignore[arg-type]


def _request(body: SamplingBody, sampling: pb.Sampling, request_id: str) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        model=body.model or "",
        sampling=sampling,
        request_id=request_id,
        n=body.n or 1,
        session=body.prompt_cache_key or body.user or "",
    )
    if (options := body.baton) is not None:
        request.priority, request.slo_class = options.priority, options.slo_class
        request.handoff.CopyFrom(pb.Handoff(codec=options.codec, quality_floor=options.quality_floor))
        if options.budget_ms is not None:
            request.budget_ms = options.budget_ms
    return request


def _sampling(body: SamplingBody) -> pb.Sampling:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    return pb.Sampling(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        seed=None if body.seed is None else body.seed % SEEDS,
        max_tokens=body.max_tokens,
        min_tokens=body.min_tokens or 0,
        stop=stop,
        stop_token_ids=body.stop_token_ids,
        ignore_eos=bool(body.ignore_eos),
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
    )
