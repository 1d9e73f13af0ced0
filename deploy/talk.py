"""From command-line words to a request, and from a stream of responses to an answer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TextIO

from baton.errors import Internal
from baton.ledger import Ledger
from baton.wire import inference_pb2 as pb
from deploy.client import ledger_of

Turn = tuple[str, str]  # role, content

_FINISH = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}
# Control characters other than tab and newline could drive the terminal that an answer is printed on.
_UNPRINTABLE = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}


@dataclass(frozen=True, slots=True)
class Answer:
    """One finished stream as the client saw it. ``decode_s``: from the first response with tokens to the last."""

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int
    decode_s: float
    ledger: Ledger

    @property
    def tokens_per_s(self) -> float:
        """Rate after the first token; 0 when there was only one."""
        return (self.completion_tokens - 1) / self.decode_s if self.decode_s > 0.0 else 0.0


def sampling(
    *, max_tokens: int | None, temperature: float | None, top_p: float | None, seed: int | None, stop: Sequence[str]
) -> pb.Sampling:
    """The sampling message; None leaves the service's default."""
    return pb.Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop)


def opening(system: str | None) -> list[Turn]:
    """The conversation before anyone spoke."""
    return [] if system is None else [("system", system)]


def raw_request(text: str, how: pb.Sampling, codec: str | None) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=text, sampling=how, handoff=pb.Handoff(codec=codec or ""))


def chat_request(turns: Iterable[Turn], how: pb.Sampling, codec: str | None) -> pb.GenerateRequest:
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return pb.GenerateRequest(chat=pb.Chat(messages=messages), sampling=how, handoff=pb.Handoff(codec=codec or ""))


def stream(responses: Iterable[pb.GenerateResponse], out: TextIO) -> Answer:
    """Writes the text to ``out`` as it comes. Raises :class:`Internal` when the stream ends without a last response."""
    safe = _UNPRINTABLE if out.isatty() else {}
    text: list[str] = []
    first_s = last_s = 0.0
    for response in responses:
        if response.token_ids:
            last_s = time.monotonic()
            first_s = first_s or last_s
        if response.text:
            text.append(response.text)
            out.write(response.text.translate(safe))
            out.flush()
        if response.finish_reason:
            out.write("\n")
            out.flush()
            return Answer(
                text="".join(text),
                finish=_FINISH.get(response.finish_reason, "an unknown reason"),
                prompt_tokens=response.usage.prompt_tokens,
                completion_tokens=response.usage.completion_tokens,
                decode_s=last_s - first_s,
                ledger=ledger_of(response.ledger),
            )
    raise Internal("the stream ended without a finish reason")
