"""The bodies that clients may send: OpenAI's fields, what this server adds to them, and which values it takes.

What OpenAI's API knows and would change the output, but this server cannot do, is a field of type :data:`Unsupported`:
null or left out it does nothing, anything else is refused by name. Fields that could not change the output
(``metadata``, ``store`` ...) are accepted and ignored. Any other field is unknown, and refused as OpenAI does.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from router.sampling import MAX_BIAS, MAX_BIASES, MAX_STOP_CHARS, MAX_STOP_IDS, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS
from router.validate import MAX_MESSAGES, MAX_MODEL_CHARS, MAX_OUTPUTS, MAX_PRIORITY, MAX_SESSION_CHARS

MAX_PROMPTS = 32  # in one request
INT32 = (1 << 31) - 1
INT64 = (1 << 63) - 1

Unsupported: TypeAlias = Annotated[None, Field(default=None, description="Not supported: must be null or left out.")]
Ignored: TypeAlias = Annotated[Any, Field(default=None, description="Accepted and ignored.")]
TokenId: TypeAlias = Annotated[int, Field(ge=0, le=INT32)]
StopString: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Penalty: TypeAlias = Annotated[float, Field(ge=-2, le=2)]


class Body(BaseModel):
    """A JSON object whose fields are all known and of exactly the type that is documented."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: Annotated[bool, Field(description="Ends the stream with an event that has the usage.")] | None = None
    include_obfuscation: Ignored
    continuous_usage_stats: Ignored


class BatonOptions(Body):
    """What the gRPC contract has and OpenAI's API has not."""

    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="Larger is scheduled earlier.")] = 0
    budget_ms: Annotated[int, Field(ge=1, le=INT64, description="Time that the whole request may take.")] | None = None
    codec: Annotated[str, Field(description="Form of the KV cache on the wire.")] = ""
    quality_floor: Annotated[str, Field(description="Lowest quality that the transfer may have.")] = ""
    slo_class: Annotated[str, Field(description="Class of service; instead of service_tier.")] = ""


class SamplingBody(Body):
    """What chats and completions share. Null is the same as left out."""

    model: Annotated[str, Field(max_length=MAX_MODEL_CHARS)] | None = None
    stream: bool | None = None
    stream_options: Annotated[StreamOptions, Field(description="Needs stream.")] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_OUTPUTS, description="Outputs for each prompt.")] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, description="0, or at least 0.01.")] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-INT64 - 1, le=INT64, description="Taken modulo 2^63.")] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]],
            Field(max_length=MAX_BIASES, description="Token ids and what is added to their logits."),
        ]
        | None
    ) = None
    # Of this server, under the names that others use too:
    top_k: Annotated[int, Field(ge=0, le=INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=2)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS)] | None = None
    ignore_eos: bool | None = None
    use_beam_search: Annotated[bool, Field(description="Must be false.")] | None = None
    baton: BatonOptions | None = None
    # Of OpenAI, without effect on the output:
    prompt_cache_key: Annotated[str, Field(max_length=MAX_SESSION_CHARS, description="The session.")] | None = None
    user: (
        Annotated[str, Field(max_length=MAX_SESSION_CHARS, description="Of no prompt_cache_key: the session.")] | None
    ) = None


class CompletionRequest(SamplingBody):
    """``POST /v1/completions``."""

    prompt: Annotated[
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)],
        Field(description="Text, token ids, or a list of either."),
    ]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: Annotated[bool, Field(description="Puts the prompt before the output; not with logprobs.")] | None = None
    best_of: Annotated[int, Field(description="Must be the same as n.")] | None = None
    suffix: Unsupported


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)] | None = None
    name: Annotated[str, Field(description="Accepted and ignored.")] | None = None
    # Clients send back the assistant's messages as they got them.
    refusal: Unsupported
    audio: Unsupported
    function_call: Unsupported
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class TextFormat(Body):
    type: Literal["text"]


class ChatRequest(SamplingBody):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32, description="Newer name of max_tokens.")] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS, description="Needs logprobs.")] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    tools: Annotated[list[Any], Field(max_length=0, description="Not supported: must be empty.")] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Ignored
    metadata: Ignored
    store: Ignored
    service_tier: (
        Annotated[str, Field(description="A class of service, by its name or its tier; auto and default: none.")] | None
    ) = None
    prompt_cache_retention: Ignored
    safety_identifier: Ignored
    audio: Unsupported
    functions: Unsupported
    function_call: Unsupported
    prediction: Unsupported
    reasoning_effort: Unsupported
    verbosity: Unsupported
    web_search_options: Unsupported


class TokenizeRequest(Body):
    """``POST /tokenize``: a prompt, or messages."""

    model: Annotated[str, Field(max_length=MAX_MODEL_CHARS)] | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None


class DetokenizeRequest(Body):
    """``POST /detokenize``."""

    model: Annotated[str, Field(max_length=MAX_MODEL_CHARS)] | None = None
    tokens: list[TokenId]
