"""From the contract's responses to typed answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from baton.errors import Internal
from baton.ledger import Ledger
from baton.request import FinishReason
from baton.wire import inference_pb2 as pb

_FINISH = {pb.FINISH_REASON_STOP: FinishReason.STOP, pb.FINISH_REASON_LENGTH: FinishReason.LENGTH}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompt, with the chat template's, and of one output, with the one that ended it."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of the likeliest tokens at a position; ``raw``: its bytes, as a character may span tokens."""

    token_id: int
    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The token that was chosen, its natural-log probability, and the likeliest ones at its position."""

    token_id: int
    text: str
    raw: bytes
    logprob: float
    top: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of output number ``index``. ``finish``, ``usage`` and ``ledger`` are set in the output's last part."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    usage: Usage | None = None
    ledger: Ledger | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """One whole output. ``token_ids`` hold the token that ended it, ``text`` does not."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: FinishReason
    usage: Usage
    ledger: Ledger


@dataclass(frozen=True, slots=True)
class Answer:
    """All outputs of a request, in order."""

    request_id: str
    model: str
    outputs: tuple[Output, ...]

    @property
    def text(self) -> str:
        """The first output's; so are the other properties."""
        return self.outputs[0].text

    @property
    def finish(self) -> FinishReason:
        return self.outputs[0].finish

    @property
    def usage(self) -> Usage:
        return self.outputs[0].usage

    @property
    def ledger(self) -> Ledger:
        return self.outputs[0].ledger


@dataclass(frozen=True, slots=True)
class Model:
    """A served model. ``max_context_tokens``: of prompt and output together."""

    id: str
    max_context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    dtype: str


@dataclass(slots=True)
class Reader:
    """Reads the responses of one attempt at a request for ``outputs`` outputs."""

    outputs: int
    request_id: str = ""
    model: str = ""
    delivered: bool = False
    _finished: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, request: pb.GenerateRequest) -> Reader:
        return cls(request.n if request.HasField("n") else 1)

    def part(self, response: pb.GenerateResponse) -> Part:
        self.delivered = True
        self.request_id, self.model = self.request_id or response.request_id, self.model or response.model
        last = bool(response.finish_reason)
        if last:
            self._finished.add(response.index)
        return Part(
            index=response.index,
            text=response.text,
            token_ids=tuple(response.token_ids),
            logprobs=tuple(_logprob(one) for one in response.logprobs),
            finish=_FINISH.get(response.finish_reason, FinishReason.STOP) if last else None,
            usage=Usage(response.usage.prompt_tokens, response.usage.completion_tokens) if last else None,
            ledger=_ledger(response.ledger) if last else None,
        )

    def end(self) -> None:
        """Raises :class:`Internal` when the stream ended before all its outputs did."""
        if len(self._finished) != self.outputs:
            raise Internal("the stream ended without a finish reason")

    def answer(self, parts: Iterable[Part]) -> Answer:
        """All the ``parts`` of a stream that has ended."""
        collected: list[list[Part]] = [[] for _ in range(self.outputs)]
        for part in parts:
            collected[part.index].append(part)
        return Answer(self.request_id, self.model, tuple(map(_output, collected)))


def model(wire: pb.Model) -> Model:
    return Model(wire.id, wire.max_context_tokens, wire.vocab_size, tuple(wire.eos_token_ids), wire.dtype)


def _output(parts: list[Part]) -> Output:
    last = parts[-1]
    if last.finish is None or last.usage is None or last.ledger is None:
        raise Internal("an output's last part has no finish reason")
    return Output(
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        logprobs=tuple(one for part in parts for one in part.logprobs),
        finish=last.finish,
        usage=last.usage,
        ledger=last.ledger,
    )


def _logprob(wire: pb.TokenLogprob) -> TokenLogprob:
    top = tuple(Alternative(one.token_id, one.text, one.raw, one.logprob) for one in wire.top)
    return TokenLogprob(wire.token_id, wire.text, wire.raw, wire.logprob, top)


def _ledger(wire: pb.StageLedger) -> Ledger:
    return Ledger(
        total_s=wire.total_s,
        stages={stage.name: stage.seconds for stage in wire.stages},
        transfer_busy_s=wire.transfer_busy_s,
        transfer_bytes=wire.transfer_bytes,
        codec=wire.codec,
        transport=wire.transport,
    )
