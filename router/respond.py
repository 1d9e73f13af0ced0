"""Token events in, responses of the public contract out. Pure; one :class:`Assembler` per stream.

Token ids leave with the response that their event arrives in; their text may follow in a later one, or at the end. So
time to first token never waits for a character or a possible stop string to be complete.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.errors import ProtocolError
from baton.ledger import Ledger
from baton.request import FinishReason, TokenEvent
from baton.wire import inference_pb2 as pb
from engine.text import Detokenizer, StopStrings, Tokenizer
from router.validate import ParsedRequest

FINISH_REASONS: dict[FinishReason, pb.FinishReason] = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_FINISH_VALUES = frozenset(FINISH_REASONS)


class Assembler:
    """Turns one output's events into its responses.

    Over them, ``token_ids`` are all output tokens up to and including the one that ended it, and ``text`` is
    their text without special tokens, the token that ended it, or the stop string.
    """

    def __init__(self, parsed: ParsedRequest, tokenizer: Tokenizer, *, model: str, output: int = 0) -> None:
        self._parsed, self._tokenizer, self._model, self._output = parsed, tokenizer, model, output
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(parsed.stop)
        self._logprobs, self._min_tokens = parsed.sampling.logprobs, parsed.sampling.min_tokens
        self._tokens = 0
        self._begun = False
        self._finish_reason: FinishReason | None = None

    @property
    def tokens(self) -> int:
        """Output tokens so far."""
        return self._tokens

    @property
    def finished(self) -> bool:
        """Whether the output has ended. If a stop string ended it the workers do not know: cancel there."""
        return self._finish_reason is not None

    @property
    def finish_reason(self) -> str:
        """Why the output ended; empty before."""
        return self._finish_reason or ""

    def push(self, events: Sequence[TokenEvent]) -> pb.GenerateResponse | None:
        """One response for all of ``events``, or None if there is nothing to tell. Events after the end are dropped.

        Raises :class:`ProtocolError` when a token is missing, repeated or incomplete.
        """
        tokens, text, logprobs = list[int](), "", list[pb.TokenLogprob]()
        for event in events:
            if self._finish_reason is not None:
                break
            self._check(event)
            self._tokens += 1
            tokens.append(event.token)
            if self._logprobs:
                logprobs.append(self._logprob(event))
            text += self._advance(event)
        if not tokens:
            return None
        return self._begin(pb.GenerateResponse(token_ids=tokens, text=text, logprobs=logprobs))

    def finish(self, ledger: Ledger) -> pb.GenerateResponse:
        """The last response: finish reason, usage and ledger. Raises :class:`ProtocolError` before the end."""
        if self._finish_reason is None:
            raise ProtocolError(f"the stream of {self._parsed.request_id} ended after {self._tokens} tokens unfinished")
        prompt_tokens = len(self._parsed.prompt)
        return self._begin(
            pb.GenerateResponse(
                finish_reason=FINISH_REASONS[self._finish_reason],
                usage=pb.Usage(
                    prompt_tokens=prompt_tokens,
                    completion_tokens=self._tokens,
                    total_tokens=prompt_tokens + self._tokens,
                ),
                ledger=ledger_to_proto(ledger),
            )
        )

    def _begin(self, response: pb.GenerateResponse) -> pb.GenerateResponse:
        """Names request and model in the output's first response."""
        response.index = self._output
        if not self._begun:
            self._begun = True
            response.request_id, response.model = self._parsed.request_id, self._model
        return response

    def _check(self, event: TokenEvent) -> None:
        if event.index != self._tokens:
            raise ProtocolError(f"token {event.index} of {self._parsed.request_id} came, {self._tokens} was due")
        if event.finish and event.finish not in _FINISH_VALUES:
            raise ProtocolError(f"unknown finish reason {event.finish!r}")

    def _advance(self, event: TokenEvent) -> str:
        """The text that ``event`` decides; ends the output at a stop string or at the event's own end."""
        delta = "" if event.finish == FinishReason.STOP else self._detokenizer.push(event.token)
        if event.finish:
            delta += self._detokenizer.flush()
        if self._tokens <= self._min_tokens:
            text, matched = delta, False
        else:
            text, matched = self._stops.push(delta)
        if matched:
            self._finish_reason = FinishReason.STOP
        elif event.finish:
            self._finish_reason = FinishReason(event.finish)
            text += self._stops.flush()
        return text

    def _logprob(self, event: TokenEvent) -> pb.TokenLogprob:
        if event.logprob is None:
            raise ProtocolError(f"token {event.index} of {self._parsed.request_id} has no log-probability")
        text, raw = self._tokenizer.token_text, self._tokenizer.token_bytes
        return pb.TokenLogprob(
            token_id=event.token,
            text=text(event.token),
            raw=raw(event.token),
            logprob=event.logprob,
            top=[
                pb.TokenLogprob.Alternative(
                    token_id=other.token, text=text(other.token), raw=raw(other.token), logprob=other.logprob
                )
                for other in event.top
            ],
        )


def ledger_to_proto(ledger: Ledger) -> pb.StageLedger:
    """The ledger as the contract has it, stages in their order."""
    return pb.StageLedger(
        stages=[pb.StageLedger.Stage(name=name, seconds=seconds) for name, seconds in ledger.stages.items()],
        total_s=ledger.total_s,
        transfer_busy_s=ledger.transfer_busy_s,
        transfer_exposed_s=ledger.transfer_exposed_s,
        transfer_bytes=ledger.transfer_bytes,
        transfer_hidden_share=ledger.transfer_hidden_share,
        codec=ledger.codec,
        transport=ledger.transport,
    )
