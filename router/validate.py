"""A request of the public contract, checked once. What passes here is trusted by everything behind it.

Pure: the deployment's limits, the tokenizer and random bits go in; a :class:`ParsedRequest` or an error that names the
field comes out. Cheap checks come first, and no more text is tokenized than could fit the context.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from baton.config import AUTO, CODECS, FLOORS, LOSS, Config, codecs_within
from baton.errors import DeadlineExceeded, InvalidRequest, NotFound
from baton.request import Sampling, Work
from baton.wire import inference_pb2 as pb
from engine.text import Tokenizer

MAX_MODEL_CHARS = 256
MAX_PRIORITY = 100
MAX_MESSAGES = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 64
MAX_TOP_LOGPROBS = 20
LEAST_DIVISOR = 0.01  # logits divided by less leave float32's range
ROLES = ("system", "user", "assistant", "tool")
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
SHOWN_CHARS = 64  # of a client's value in a message: details travel in a header of limited size


@dataclass(frozen=True, slots=True)
class Limits:
    """What the deployment serves and allows."""

    model: str
    context_tokens: int
    max_request_bytes: int
    max_deadline_s: float
    codec: str
    quality_floor: str

    @classmethod
    def of(cls, config: Config, *, context_tokens: int) -> Limits:
        return cls(
            model=config.model.id,
            context_tokens=context_tokens,
            max_request_bytes=config.router.max_request_bytes,
            max_deadline_s=config.router.deadline_s,
            codec=config.handoff.codec,
            quality_floor=config.handoff.quality_floor,
        )


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A valid request. ``request_id`` is what the client is told; ``stop`` are strings, which only the router knows."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    stop: tuple[str, ...]
    priority: int
    budget_s: float
    codec: str  # or "auto": any that the floor allows
    floor: str = "exact"

    def work(self, request_id: str) -> Work:
        """What workers compute, under the id that they know the request by."""
        return Work(request_id, self.prompt, self.sampling, self.priority, self.budget_s)


def parse(
    request: pb.GenerateRequest,
    limits: Limits,
    tokenizer: Tokenizer,
    *,
    seed: int,
    grpc_remaining_s: float | None = None,
) -> ParsedRequest:
    """``request`` with every default filled in.

    ``seed``: 63 random bits, drawn by the caller. They seed the sampling of a request that sets no seed, and their
    digest is the id of a request that has none. ``grpc_remaining_s``: time left until the gRPC deadline, if there is
    one. Raises :class:`InvalidRequest` or :class:`NotFound` that name the field, or :class:`DeadlineExceeded`.
    """
    _check_size(request, limits)
    _check_model(request.model, limits)
    request_id = _request_id(request, seed)
    _check_range("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
    budget_s = _budget_s(request, limits, grpc_remaining_s)
    floor = _floor(request.handoff, limits)
    codec = _codec(request.handoff, limits, floor)
    _check_sampling(request.sampling, tokenizer.vocab_size)
    prompt = _prompt(request, limits, tokenizer)
    return ParsedRequest(
        request_id=request_id,
        prompt=tuple(prompt),
        sampling=_sampling(request.sampling, len(prompt), limits, tokenizer, seed),
        stop=tuple(request.sampling.stop),
        priority=request.priority,
        budget_s=budget_s,
        codec=codec,
        floor=floor,
    )


def tokenize(request: pb.TokenizeRequest, limits: Limits, tokenizer: Tokenizer) -> list[int]:
    """The token ids of ``request``'s input; errors as those of :func:`parse`."""
    _check_size(request, limits)
    _check_model(request.model, limits)
    match request.WhichOneof("input"):
        case "prompt":
            _check_chars("prompt", len(request.prompt), limits, tokenizer)
            return tokenizer.encode(request.prompt)
        case "chat":
            return _chat(request.chat, limits, tokenizer)
        case _:
            raise InvalidRequest("input", "is missing; set prompt or chat")


# ---- parts of a request


def _check_size(request: pb.GenerateRequest | pb.TokenizeRequest, limits: Limits) -> None:
    size_bytes = request.ByteSize()
    if size_bytes > limits.max_request_bytes:
        raise InvalidRequest("request", f"is {size_bytes} bytes; at most {limits.max_request_bytes} are accepted")


def _check_model(model: str, limits: Limits) -> None:
    if len(model) > MAX_MODEL_CHARS:
        raise InvalidRequest("model", f"is {len(model)} characters long; at most {MAX_MODEL_CHARS} are allowed")
    if model not in ("", limits.model):
        raise NotFound("model", f"unknown model {_shown(model)}; served here: {limits.model!r}")


def _request_id(request: pb.GenerateRequest, seed: int) -> str:
    if not request.HasField("request_id"):
        return hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8).hexdigest()
    if not REQUEST_ID.fullmatch(request.request_id):
        raise InvalidRequest("request_id", f"is {_shown(request.request_id)}; allowed: {REQUEST_ID.pattern}")
    return request.request_id


def _budget_s(request: pb.GenerateRequest, limits: Limits, grpc_remaining_s: float | None) -> float:
    """The smallest of the client's budget, its gRPC deadline and the deployment's longest deadline."""
    budget_s = limits.max_deadline_s
    if request.HasField("budget_ms"):
        if request.budget_ms < 1:
            raise InvalidRequest("budget_ms", f"is {request.budget_ms}; must be at least 1")
        budget_s = min(budget_s, request.budget_ms / 1000)
    if grpc_remaining_s is not None:
        if grpc_remaining_s <= 0:
            raise DeadlineExceeded("the deadline had passed when the request arrived")
        budget_s = min(budget_s, grpc_remaining_s)
    return budget_s


def _floor(handoff: pb.Handoff, limits: Limits) -> str:
    """The stricter of the request's and the deployment's."""
    if handoff.quality_floor and handoff.quality_floor not in FLOORS:
        known = ", ".join(FLOORS)
        raise InvalidRequest("handoff.quality_floor", f"unknown floor {_shown(handoff.quality_floor)}; known: {known}")
    return min(handoff.quality_floor or limits.quality_floor, limits.quality_floor, key=FLOORS.index)


def _codec(handoff: pb.Handoff, limits: Limits, floor: str) -> str:
    known = (AUTO, *CODECS)
    if handoff.codec and handoff.codec not in known:
        raise InvalidRequest("handoff.codec", f"unknown codec {_shown(handoff.codec)}; known: {', '.join(known)}")
    allowed = (AUTO, *codecs_within(floor))
    if not handoff.codec:
        return limits.codec if limits.codec in allowed else "lossless"
    if handoff.codec not in allowed:
        whose = "deployment's" if LOSS[handoff.codec] > FLOORS.index(limits.quality_floor) else "request's"
        raise InvalidRequest(
            "handoff.codec",
            f"{handoff.codec!r} is below the {whose} quality floor {floor!r}; allowed: {', '.join(allowed)}",
        )
    return handoff.codec


# ---- input


def _prompt(request: pb.GenerateRequest, limits: Limits, tokenizer: Tokenizer) -> list[int]:
    name = request.WhichOneof("input")
    match name:
        case "prompt":
            _check_chars("prompt", len(request.prompt), limits, tokenizer)
            prompt = tokenizer.encode(request.prompt)
        case "token_ids":
            name = "token_ids.ids"
            _check_prompt_tokens(name, len(request.token_ids.ids), limits)
            prompt = list(request.token_ids.ids)
            _check_ids(name, prompt, tokenizer.vocab_size)
        case "chat":
            prompt = _chat(request.chat, limits, tokenizer)
        case _:
            raise InvalidRequest("input", "is missing; set prompt, token_ids or chat")
    _check_prompt_tokens(name, len(prompt), limits)
    return prompt


def _chat(chat: pb.Chat, limits: Limits, tokenizer: Tokenizer) -> list[int]:
    _check_range("chat.messages", len(chat.messages), 1, MAX_MESSAGES, what="has {} messages")
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            field = f"chat.messages[{index}].role"
            raise InvalidRequest(field, f"is {_shown(message.role)}; allowed: {', '.join(ROLES)}")
    _check_chars("chat.messages", sum(len(message.content) for message in chat.messages), limits, tokenizer)
    return tokenizer.chat([(message.role, message.content) for message in chat.messages])


def _check_chars(field: str, chars: int, limits: Limits, tokenizer: Tokenizer) -> None:
    """Refuses, before the work of tokenizing it, text that is too long whatever its tokens are."""
    most = limits.context_tokens * tokenizer.max_token_chars
    if chars > most:
        raise InvalidRequest(
            field,
            f"is {chars} characters long; a context of {limits.context_tokens} tokens, each at most "
            f"{tokenizer.max_token_chars} characters, holds at most {most}",
        )


def _check_prompt_tokens(field: str, tokens: int, limits: Limits) -> None:
    if tokens < 1:
        raise InvalidRequest(field, "is empty; at least one token is needed")
    if tokens >= limits.context_tokens:
        raise InvalidRequest(
            field,
            f"is {tokens} tokens long; the context has {limits.context_tokens} and one of them must be left for the "
            f"output, so at most {limits.context_tokens - 1} are allowed",
        )


# ---- sampling


def _check_sampling(sampling: pb.Sampling, vocab_size: int) -> None:
    """Everything that does not depend on the prompt."""
    if not (sampling.HasField("temperature") and sampling.temperature == 0):
        _check_range("sampling.temperature", _temperature(sampling), LEAST_DIVISOR, 2, also="0 or ")
    if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:
        raise InvalidRequest("sampling.top_p", f"is {sampling.top_p}; allowed: (0, 1]")
    _check_range("sampling.top_k", sampling.top_k, 0, vocab_size)
    _check_range("sampling.min_p", sampling.min_p, 0, 1)
    _check_range("sampling.repetition_penalty", _repetition_penalty(sampling), LEAST_DIVISOR, 2)
    _check_range("sampling.presence_penalty", sampling.presence_penalty, -2, 2)
    _check_range("sampling.frequency_penalty", sampling.frequency_penalty, -2, 2)
    if sampling.seed < 0:
        raise InvalidRequest("sampling.seed", f"is {sampling.seed}; allowed: [0, 2^63)")
    if sampling.HasField("max_tokens") and sampling.max_tokens < 1:
        raise InvalidRequest("sampling.max_tokens", f"is {sampling.max_tokens}; must be at least 1")
    _check_stops(sampling, vocab_size)
    _check_range("sampling.top_logprobs", sampling.top_logprobs, 0, MAX_TOP_LOGPROBS)
    if sampling.top_logprobs and not sampling.logprobs:
        raise InvalidRequest("sampling.top_logprobs", f"is {sampling.top_logprobs}, but sampling.logprobs is not set")


def _check_stops(sampling: pb.Sampling, vocab_size: int) -> None:
    _check_range("sampling.stop", len(sampling.stop), 0, MAX_STOP_STRINGS, what="has {} strings")
    for index, stop in enumerate(sampling.stop):
        _check_range(f"sampling.stop[{index}]", len(stop), 1, MAX_STOP_CHARS, what="is {} characters long")
    _check_range("sampling.stop_token_ids", len(sampling.stop_token_ids), 0, MAX_STOP_IDS, what="has {} ids")
    _check_ids("sampling.stop_token_ids", sampling.stop_token_ids, vocab_size)


def _sampling(
    sampling: pb.Sampling, prompt_tokens: int, limits: Limits, tokenizer: Tokenizer, random_seed: int
) -> Sampling:
    """``sampling``, already checked on its own, for a prompt of this length."""
    room = limits.context_tokens - prompt_tokens
    max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else room
    if max_tokens > room:
        raise InvalidRequest(
            "sampling.max_tokens",
            f"is {max_tokens}; the context has {limits.context_tokens} tokens and the input takes {prompt_tokens}, "
            f"so at most {room} are allowed",
        )
    _check_range("sampling.min_tokens", sampling.min_tokens, 0, max_tokens)
    return Sampling(
        temperature=_temperature(sampling),
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=_repetition_penalty(sampling),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed if sampling.HasField("seed") else random_seed,
        max_tokens=max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=tuple(sampling.stop_token_ids),
        eos_token_ids=() if sampling.ignore_eos else tokenizer.eos_token_ids,
        logprobs=sampling.logprobs,
        top_logprobs=sampling.top_logprobs,
    )


def _temperature(sampling: pb.Sampling) -> float:
    return sampling.temperature if sampling.HasField("temperature") else 1.0


def _repetition_penalty(sampling: pb.Sampling) -> float:
    return sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0


# ---- values


def _check_range(field: str, value: float, least: float, most: float, *, what: str = "is {}", also: str = "") -> None:
    """NaN is in no range."""
    if not least <= value <= most:
        raise InvalidRequest(field, f"{what.format(value)}; allowed: {also}[{least}, {most}]")


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    for index, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise InvalidRequest(f"{field}[{index}]", f"is {token}; the vocabulary is [0, {vocab_size})")


def _shown(text: str) -> str:
    """A client's text for a message, cut."""
    return repr(text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…")
