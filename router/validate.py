"""A request of the public contract, checked once. What passes here is trusted by everything behind it.

Pure: the deployment's limits, the tokenizer and random bits go in; a :class:`ParsedRequest` or an error that names the
field comes out. Cheap checks come first, and no more text is tokenized than could fit the context.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from baton.config import Config
from baton.config_admission import AdmissionConfig, ClassConfig
from baton.config_handoff import AUTO, CODECS, FLOORS, LOSS, codecs_within
from baton.errors import CONTEXT_LENGTH_EXCEEDED, DeadlineExceeded, InvalidRequest, NotFound
from baton.request import Sampling, Work
from baton.wire import inference_pb2 as pb
from engine.text import Tokenizer
from router import sampling
from router.fields import check_ids, check_range, shown

MAX_MODEL_CHARS = 256
MAX_SESSION_CHARS = 256
MAX_PRIORITY = 100
MAX_MESSAGES = 1024
MAX_OUTPUTS = 32
ROLES = ("system", "user", "assistant", "tool")
SEEDS = 1 << 63  # seeds are below it
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the deployment serves and allows."""

    model: str
    context_tokens: int
    max_request_bytes: int
    max_deadline_s: float
    codec: str
    quality_floor: str
    body_s: float = 30.0
    classes: Mapping[str, ClassConfig] = field(default_factory=lambda: AdmissionConfig().classes)
    default_class: str = AdmissionConfig().default_class

    @classmethod
    def of(cls, config: Config, *, context_tokens: int) -> Limits:
        return cls(
            model=config.model.id,
            context_tokens=context_tokens,
            max_request_bytes=config.router.max_request_bytes,
            max_deadline_s=config.router.deadline_s,
            codec=config.handoff.codec,
            quality_floor=config.handoff.quality_floor,
            body_s=config.ingress.body_s,
            classes=config.admission.classes,
            default_class=config.admission.default_class,
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
    outputs: int = 1
    session: str = ""  # a digest: what the client calls it stays here
    slo_class: str = ""
    slo: ClassConfig = field(default_factory=ClassConfig)  # what that class is promised

    def work(self, request_id: str, output: int = 0) -> Work:
        """What workers compute for one of the outputs, under the id that they know it by."""
        sampling = replace(self.sampling, seed=(self.sampling.seed + output) % SEEDS) if output else self.sampling
        return Work(request_id, self.prompt, sampling, self.priority, self.budget_s, session=self.session)


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
    check_range("priority", request.priority, -MAX_PRIORITY, MAX_PRIORITY)
    outputs = request.n if request.HasField("n") else 1
    check_range("n", outputs, 1, MAX_OUTPUTS)
    budget_s = _budget_s(request, limits, grpc_remaining_s)
    floor = _floor(request.handoff, limits)
    codec = _codec(request.handoff, limits, floor)
    slo_class = _slo_class(request.slo_class, limits)
    slo = limits.classes[slo_class]
    sampling.check(request.sampling, tokenizer.vocab_size)
    prompt = _prompt(request, limits, tokenizer)
    return ParsedRequest(
        request_id=request_id,
        prompt=tuple(prompt),
        sampling=sampling.fill(request.sampling, len(prompt), limits.context_tokens, tokenizer, seed),
        stop=tuple(request.sampling.stop),
        priority=max(-MAX_PRIORITY, min(request.priority + slo.priority, MAX_PRIORITY)),
        budget_s=budget_s,
        codec=codec,
        floor=floor,
        outputs=outputs,
        session=_session(request.session),
        slo_class=slo_class,
        slo=slo,
    )


def outputs(request: pb.GenerateRequest) -> int:
    """How many outputs ``request`` asks for, to be counted before it is parsed: 1 where that is no number allowed."""
    return request.n if 1 <= request.n <= MAX_OUTPUTS else 1


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


def detokenize(request: pb.DetokenizeRequest, limits: Limits, tokenizer: Tokenizer) -> str:
    """The text of ``request``'s ids; errors as those of :func:`parse`."""
    _check_size(request, limits)
    _check_model(request.model, limits)
    check_range("token_ids", len(request.token_ids), 0, limits.context_tokens, what="has {} ids")
    check_ids("token_ids", request.token_ids, tokenizer.vocab_size)
    return tokenizer.decode(request.token_ids, special=True)


# ---- parts of a request


def _check_size(request: pb.GenerateRequest | pb.TokenizeRequest | pb.DetokenizeRequest, limits: Limits) -> None:
    size_bytes = request.ByteSize()
    if size_bytes > limits.max_request_bytes:
        raise InvalidRequest("request", f"is {size_bytes} bytes; at most {limits.max_request_bytes} are accepted")


def _check_model(model: str, limits: Limits) -> None:
    if len(model) > MAX_MODEL_CHARS:
        raise InvalidRequest("model", f"is {len(model)} characters long; at most {MAX_MODEL_CHARS} are allowed")
    if model not in ("", limits.model):
        raise NotFound("model", f"unknown model {shown(model)}; served here: {limits.model!r}")


def _request_id(request: pb.GenerateRequest, seed: int) -> str:
    if not request.HasField("request_id"):
        return hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8).hexdigest()
    if not REQUEST_ID.fullmatch(request.request_id):
        raise InvalidRequest("request_id", f"is {shown(request.request_id)}; allowed: {REQUEST_ID.pattern}")
    return request.request_id


def _session(session: str) -> str:
    if len(session) > MAX_SESSION_CHARS:
        raise InvalidRequest("session", f"is {len(session)} characters long; at most {MAX_SESSION_CHARS} are allowed")
    return hashlib.blake2b(session.encode(), digest_size=8).hexdigest() if session else ""


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


def _slo_class(named: str, limits: Limits) -> str:
    """The class of that name, or that OpenAI's clients call so."""
    if not named:
        return limits.default_class
    if named in limits.classes:
        return named
    for name, slo in limits.classes.items():
        if slo.service_tier == named:
            return name
    raise InvalidRequest("slo_class", f"unknown class {shown(named)}; known: {', '.join(limits.classes)}")


def _floor(handoff: pb.Handoff, limits: Limits) -> str:
    """The stricter of the request's and the deployment's."""
    if handoff.quality_floor and handoff.quality_floor not in FLOORS:
        known = ", ".join(FLOORS)
        raise InvalidRequest("handoff.quality_floor", f"unknown floor {shown(handoff.quality_floor)}; known: {known}")
    return min(handoff.quality_floor or limits.quality_floor, limits.quality_floor, key=FLOORS.index)


def _codec(handoff: pb.Handoff, limits: Limits, floor: str) -> str:
    known = (AUTO, *CODECS)
    if handoff.codec and handoff.codec not in known:
        raise InvalidRequest("handoff.codec", f"unknown codec {shown(handoff.codec)}; known: {', '.join(known)}")
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
            check_ids(name, prompt, tokenizer.vocab_size)
        case "chat":
            prompt = _chat(request.chat, limits, tokenizer)
        case _:
            raise InvalidRequest("input", "is missing; set prompt, token_ids or chat")
    _check_prompt_tokens(name, len(prompt), limits)
    return prompt


def _chat(chat: pb.Chat, limits: Limits, tokenizer: Tokenizer) -> list[int]:
    check_range("chat.messages", len(chat.messages), 1, MAX_MESSAGES, what="has {} messages")
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            field = f"chat.messages[{index}].role"
            raise InvalidRequest(field, f"is {shown(message.role)}; allowed: {', '.join(ROLES)}")
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
            reason=CONTEXT_LENGTH_EXCEEDED,
        )


def _check_prompt_tokens(field: str, tokens: int, limits: Limits) -> None:
    if tokens < 1:
        raise InvalidRequest(field, "is empty; at least one token is needed")
    if tokens >= limits.context_tokens:
        raise InvalidRequest(
            field,
            f"is {tokens} tokens long; the context has {limits.context_tokens} and one of them must be left for the "
            f"output, so at most {limits.context_tokens - 1} are allowed",
            reason=CONTEXT_LENGTH_EXCEEDED,
        )
