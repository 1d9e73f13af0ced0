"""The bodies that clients get back. What OpenAI's API sends as null is null here; what it leaves out is left out.

Fields with a default are sent only where they were set: :func:`text` is the one way from an answer to JSON.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

FinishReason: TypeAlias = Literal["stop", "length"]


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def text(answer: Answer) -> str:
    return answer.model_dump_json(exclude_unset=True)


# ---- shared by chats and completions


class Usage(Answer):
    """The prompt counts once, however many outputs it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Ledger(Answer):
    """Where the time of one output went, as StageLedger of the gRPC contract."""

    index: Annotated[int, Field(description="Of the choice.")]
    total_s: float
    stages: Annotated[dict[str, float], Field(description="Seconds in each stage; they sum to total_s.")]
    transfer_busy_s: float
    transfer_exposed_s: float
    transfer_hidden_share: float
    transfer_bytes: int
    codec: str
    transport: str


class Baton(Answer):
    """What this server adds to an answer."""

    request_id: str
    ledgers: list[Ledger]


class TopLogprob(Answer):
    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Common(Answer):
    id: str
    created: Annotated[int, Field(description="Unix seconds.")]
    model: str
    system_fingerprint: Annotated[str, Field(description="Of the model's KV layout.")]


class Whole(Common):
    usage: Usage
    baton: Baton


class Chunk(Common):
    """One event of a stream. Where usage was asked for it is null in every event but the last."""

    usage: Usage | None = None
    baton: Annotated[Baton | None, Field(description="In the last event only.")] = None


# ---- chats


class ChatLogprobs(Answer):
    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answer):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Whole):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Delta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Answer):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Chunk):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


# ---- completions


class CompletionLogprobs(Answer):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: Annotated[list[int], Field(description="Characters of the choice's tokens before this one.")]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(Whole):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class CompletionChunk(Chunk):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


# ---- the rest


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: Annotated[int, Field(description="Most tokens of prompt and output together.")]


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


class Tokens(Answer):
    count: int
    max_model_len: int
    tokens: list[int]


class Text(Answer):
    prompt: str


class Health(Answer):
    ready: bool


class ErrorDetail(Answer):
    message: str
    type: str
    param: Annotated[str | None, Field(description="The field at fault.")]
    code: str | None


class Error(Answer):
    error: ErrorDetail
