"""Responses of the gRPC contract as answers of OpenAI's form, whole or in events. Pure; one object per request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from baton.wire import inference_pb2 as pb
from router.openai import answers
from router.openai.answers import (
    AssistantMessage,
    Baton,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Chunk,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    Delta,
    FinishReason,
    Usage,
    Whole,
)

FINISH: dict[int, FinishReason] = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class Head:
    """What every answer to one request says of it. ``choices``: how many there will be."""

    request_id: str
    created: int
    model: str
    fingerprint: str
    choices: int

    def fields(self, prefix: str) -> dict[str, Any]:
        return {
            "id": f"{prefix}-{self.request_id}",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


@dataclass(slots=True)
class Output:
    """One choice so far."""

    text: str = ""
    logprobs: list[pb.TokenLogprob] = field(default_factory=list)
    offset: int = 0  # characters of the tokens whose log-probabilities were told
    begun: bool = False
    last: pb.GenerateResponse | None = None

    @property
    def ended(self) -> pb.GenerateResponse:
        """The last response; a stream that ended without one has raised before."""
        assert self.last is not None
        return self.last


class Form(Protocol):
    """A chat's or a completion's shape."""

    def whole(self, outputs: Sequence[Output], usage: Usage, baton: Baton) -> Whole: ...
    def delta(self, index: int, output: Output, response: pb.GenerateResponse, **more: Any) -> Chunk: ...
    def closing(self, **more: Any) -> Chunk: ...


class Assembler:
    """Collects the outputs of all prompts of one request.

    Choice ``prompt * n + index`` is output ``index`` of that prompt. ``usage_wanted``: every event has a usage, null
    but in one more event at the end.
    """

    def __init__(self, form: Form, head: Head, *, n: int, usage_wanted: bool = False) -> None:
        self._form, self._head, self._n, self._usage_wanted = form, head, n, usage_wanted
        self._outputs = [Output() for _ in range(head.choices)]

    def collect(self, prompt: int, response: pb.GenerateResponse) -> None:
        """For :meth:`whole`."""
        output = self._output(prompt, response)
        output.text += response.text
        output.logprobs += response.logprobs

    def whole(self) -> Whole:
        """The answer, when every output has ended."""
        return self._form.whole(self._outputs, self._usage(), self._baton())

    def chunks(self, prompt: int, response: pb.GenerateResponse) -> Iterator[Chunk]:
        """What ``response`` adds to the stream: nothing while its text is held back."""
        output = self._output(prompt, response)
        done = all(each.last is not None for each in self._outputs)
        more: dict[str, Any] = {"usage": None} if self._usage_wanted else {}
        if done and not self._usage_wanted:
            more["baton"] = self._baton()
        if response.text or response.logprobs or response.finish_reason or not output.begun:
            yield self._form.delta(prompt * self._n + response.index, output, response, **more)
        output.begun = True
        if done and self._usage_wanted:
            yield self._form.closing(usage=self._usage(), baton=self._baton())

    def _output(self, prompt: int, response: pb.GenerateResponse) -> Output:
        output = self._outputs[prompt * self._n + response.index]
        if response.finish_reason:
            output.last = response
        return output

    def _usage(self) -> Usage:
        used = [output.ended.usage for output in self._outputs]
        prompts, outputs = sum(each.prompt_tokens for each in used[:: self._n]), sum(u.completion_tokens for u in used)
        return Usage(prompt_tokens=prompts, completion_tokens=outputs, total_tokens=prompts + outputs)

    def _baton(self) -> Baton:
        ledgers = [_ledger(index, output.ended.ledger) for index, output in enumerate(self._outputs)]
        return Baton(request_id=self._head.request_id, ledgers=ledgers)


class Chats:
    """``chat.completion``. ``logprobs``: whether they were asked for."""

    def __init__(self, head: Head, *, logprobs: bool) -> None:
        self._head, self._wanted = head.fields("chatcmpl"), logprobs

    def whole(self, outputs: Sequence[Output], usage: Usage, baton: Baton) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(role="assistant", content=output.text, refusal=None),
                logprobs=self._logprobs(output.logprobs),
                finish_reason=FINISH[output.ended.finish_reason],
            )
            for index, output in enumerate(outputs)
        ]
        return ChatCompletion(object="chat.completion", choices=choices, usage=usage, baton=baton, **self._head)

    def delta(self, index: int, output: Output, response: pb.GenerateResponse, **more: Any) -> ChatChunk:
        if not output.begun:
            delta = Delta(role="assistant", content=response.text)
        else:
            delta = Delta(content=response.text) if response.text else Delta()
        choice = ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._logprobs(response.logprobs) if response.logprobs else None,
            finish_reason=FINISH.get(response.finish_reason),
        )
        return ChatChunk(object="chat.completion.chunk", choices=[choice], **self._head, **more)

    def closing(self, **more: Any) -> ChatChunk:
        return ChatChunk(object="chat.completion.chunk", choices=[], **self._head, **more)

    def _logprobs(self, tokens: Sequence[pb.TokenLogprob]) -> ChatLogprobs | None:
        if not self._wanted:
            return None
        content = [
            answers.TokenLogprob(
                token=token.text,
                bytes=list(token.raw),
                logprob=token.logprob,
                top_logprobs=[
                    answers.TopLogprob(token=other.text, bytes=list(other.raw), logprob=other.logprob)
                    for other in token.top
                ],
            )
            for token in tokens
        ]
        return ChatLogprobs(content=content, refusal=None)


class Completions:
    """``text_completion``. ``echoes``: what stands before each choice's output."""

    def __init__(self, head: Head, *, logprobs: bool, echoes: Sequence[str]) -> None:
        self._head, self._wanted, self._echoes = head.fields("cmpl"), logprobs, echoes

    def whole(self, outputs: Sequence[Output], usage: Usage, baton: Baton) -> Completion:
        choices = [
            CompletionChoice(
                index=index,
                text=self._echoes[index] + output.text,
                logprobs=self._logprobs(output, output.logprobs),
                finish_reason=FINISH[output.ended.finish_reason],
            )
            for index, output in enumerate(outputs)
        ]
        return Completion(object="text_completion", choices=choices, usage=usage, baton=baton, **self._head)

    def delta(self, index: int, output: Output, response: pb.GenerateResponse, **more: Any) -> CompletionChunk:
        choice = CompletionChoice(
            index=index,
            text=response.text if output.begun else self._echoes[index] + response.text,
            logprobs=self._logprobs(output, response.logprobs) if response.logprobs else None,
            finish_reason=FINISH.get(response.finish_reason),
        )
        return CompletionChunk(object="text_completion", choices=[choice], **self._head, **more)

    def closing(self, **more: Any) -> CompletionChunk:
        return CompletionChunk(object="text_completion", choices=[], **self._head, **more)

    def _logprobs(self, output: Output, tokens: Sequence[pb.TokenLogprob]) -> CompletionLogprobs | None:
        if not self._wanted:
            return None
        offsets = []
        for token in tokens:
            offsets.append(output.offset)
            output.offset += len(token.text)
        return CompletionLogprobs(
            tokens=[token.text for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[_alternatives(token) for token in tokens],
            text_offset=offsets,
        )


def _alternatives(token: pb.TokenLogprob) -> dict[str, float]:
    """The chosen token is among them; of several with one text the likeliest counts."""
    found: dict[str, float] = {}
    for other in token.top:
        found.setdefault(other.text, other.logprob)
    found.setdefault(token.text, token.logprob)
    return found


def _ledger(index: int, ledger: pb.StageLedger) -> answers.Ledger:
    return answers.Ledger(
        index=index,
        total_s=ledger.total_s,
        stages={stage.name: stage.seconds for stage in ledger.stages},
        transfer_busy_s=ledger.transfer_busy_s,
        transfer_exposed_s=ledger.transfer_exposed_s,
        transfer_hidden_share=ledger.transfer_hidden_share,
        transfer_bytes=ledger.transfer_bytes,
        codec=ledger.codec,
        transport=ledger.transport,
    )
