"""From a caller's arguments to the messages of the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from baton.errors import InvalidRequest
from baton.wire import inference_pb2 as pb

Turn = tuple[str, str]  # role, content
Prompt = str | Sequence[int]


class Options(TypedDict, total=False):
    """What may be asked of a generation. Meaning, default and limits of each are those of the contract's field of that
    name (proto/baton/v1/inference.proto); what is absent or None is left to the server. ``timeout_s``: for the whole
    call, retries and pauses included; the server is told what is left of it, as the request's budget.
    """

    timeout_s: float | None
    model: str | None
    n: int | None
    priority: int | None
    request_id: str | None
    session: str | None
    slo_class: str | None
    codec: str | None
    quality_floor: str | None
    max_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    stop: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logprobs: bool | None
    top_logprobs: int | None
    logit_bias: Mapping[int, float] | None


_REQUEST = ("model", "n", "priority", "request_id", "session", "slo_class")
_HANDOFF = ("codec", "quality_floor")
_SAMPLING = tuple(pb.Sampling.DESCRIPTOR.fields_by_name)


def completion(prompt: Prompt, options: Options) -> pb.GenerateRequest:
    """Continues text as it stands, or token ids unchanged. Raises :class:`InvalidRequest` for a wrong type or value."""
    request = _request(options)
    if isinstance(prompt, str):
        _set(request, "prompt", prompt, "prompt")
    else:
        request.token_ids.SetInParent()
        _set(request.token_ids, "ids", prompt, "token_ids")
    return request


def conversation(turns: Sequence[Turn], options: Options) -> pb.GenerateRequest:
    """Answers a conversation, oldest turn first, as the assistant. Raises as :func:`completion`."""
    request = _request(options)
    request.chat.CopyFrom(chat(turns))
    return request


def chat(turns: Sequence[Turn]) -> pb.Chat:
    messages = []
    for index, turn in enumerate(turns):
        if not (isinstance(turn, tuple) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
            raise InvalidRequest(f"chat.messages[{index}]", f"is {turn!r}, allowed: a tuple of role and content")
        messages.append(pb.ChatMessage(role=turn[0], content=turn[1]))
    return pb.Chat(messages=messages)


def to_tokenize(text: str | Sequence[Turn], model: str) -> pb.TokenizeRequest:
    if isinstance(text, str):
        request = pb.TokenizeRequest(model=model)
        _set(request, "prompt", text, "prompt")
        return request
    return pb.TokenizeRequest(model=model, chat=chat(text))


def to_detokenize(token_ids: Sequence[int], model: str) -> pb.DetokenizeRequest:
    request = pb.DetokenizeRequest(model=model)
    _set(request, "token_ids", token_ids, "token_ids")
    return request


def _request(options: Options) -> pb.GenerateRequest:
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    given = {name: value for name, value in options.items() if value is not None}
    request = pb.GenerateRequest()
    for message, prefix, names in (
        (request, "", _REQUEST),
        (request.handoff, "handoff.", _HANDOFF),
        (request.sampling, "sampling.", _SAMPLING),
    ):
        for name in names:
            if name in given:
                _set(message, name, given[name], prefix + name)
    return request


def _set(message: Any, name: str, value: object, path: str) -> None:
    """Sets one field; what protobuf refuses is an InvalidRequest that names it."""
    try:
        if isinstance(value, str) and message.DESCRIPTOR.fields_by_name[name].is_repeated:
            raise TypeError(f"{value!r} is one text, several are expected")  # protobuf would take its characters
        part = type(message)(**{name: value})
    except (TypeError, ValueError) as error:
        raise InvalidRequest(path, f"cannot be sent: {error}") from None
    message.MergeFrom(part)
