"""What a client receives: ids at once, text when decided, one last response with everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from baton.errors import ProtocolError
from baton.ledger import STAGES, Ledger, close
from baton.request import FinishReason, Logprob, TokenEvent
from baton.wire import inference_pb2 as pb
from engine.text import Tokenizer
from router.respond import FINISH_REASONS, Assembler, ledger_to_proto
from router.validate import ParsedRequest

Assemble = Callable[..., Assembler]
LEDGER = Ledger(
    total_s=2.0,
    stages=close(2.0, {"queue": 0.25, "prefill": 0.5, "wire": 0.125, "decode": 1.0}),
    transfer_busy_s=0.5,
    transfer_bytes=1234,
    codec="lossless",
    transport="nixl",
)


@pytest.fixture
def assemble(tokenizer: Tokenizer, parsed: Callable[..., ParsedRequest]) -> Assemble:
    """An assembler for a request with these sampling fields."""

    def build(**sampling: Any) -> Assembler:
        request = pb.GenerateRequest(prompt="hello world", request_id="r1", sampling=pb.Sampling(**sampling))
        return Assembler(parsed(request), tokenizer, model="smollm2")

    return build


def events(ids: Sequence[int], finish: str = "", start: int = 0, logprob: float | None = None) -> list[TokenEvent]:
    """Consecutive events; the last one has ``finish``."""
    last = len(ids) - 1
    return [
        TokenEvent("r1", start + at, token, logprob=logprob, finish=finish if at == last else "")
        for at, token in enumerate(ids)
    ]


def run(assembler: Assembler, all_events: Sequence[TokenEvent], batch: int = 1) -> list[pb.GenerateResponse]:
    """Everything that a router sends: until the output has ended, then the last response."""
    responses = []
    for at in range(0, len(all_events), batch):
        response = assembler.push(all_events[at : at + batch])
        assert response is not None
        responses.append(response)
        if assembler.finished:
            break
    return [*responses, assembler.finish(LEDGER)]


def text_of(responses: list[pb.GenerateResponse]) -> str:
    return "".join(response.text for response in responses)


def ids_of(responses: list[pb.GenerateResponse]) -> list[int]:
    return [token for response in responses for token in response.token_ids]


@pytest.mark.parametrize("batch", [1, 2, 3, 100])
def test_a_stream_is_complete_however_it_is_batched(assemble: Assemble, tokenizer: Tokenizer, batch: int) -> None:
    ids = [*tokenizer.encode("Héllo 🙂 龘!"), tokenizer.eos_token_ids[0]]
    responses = run(assemble(), events(ids, "stop"), batch)
    assert text_of(responses) == "Héllo 🙂 龘!"
    assert ids_of(responses) == ids
    assert len(responses) == -(-len(ids) // batch) + 1
    assert not any("\ufffd" in response.text for response in responses)


def test_first_and_last_response(assemble: Assemble, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three")
    responses = run(assemble(), events(ids, "length"))
    assert (responses[0].request_id, responses[0].model) == ("r1", "smollm2")
    assert not any(response.request_id or response.model for response in responses[1:])
    *body, last = responses
    assert not any(response.finish_reason or response.HasField("usage") for response in body)
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert last.usage == pb.Usage(prompt_tokens=2, completion_tokens=len(ids), total_tokens=2 + len(ids))
    assert last.ledger == ledger_to_proto(LEDGER)
    assert (list(last.token_ids), last.text) == ([], "")


def test_ids_go_at_once_and_text_follows(assemble: Assemble, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("龘")
    responses = run(assemble(), events(ids, "length"))
    assert [list(response.token_ids) for response in responses[:-1]] == [[token] for token in ids]
    assert [response.text for response in responses[:-1]] == [""] * (len(ids) - 1) + ["龘"]


def test_an_unfinished_character_at_the_end_is_told(assemble: Assemble, tokenizer: Tokenizer) -> None:
    responses = run(assemble(), events(tokenizer.encode("a龘")[:-1], "length"))
    assert text_of(responses) == "a\ufffd"


def test_text_of_the_token_that_ended_it_is_hidden(assemble: Assemble, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("stop here now")
    responses = run(assemble(stop_token_ids=[ids[-1]]), events(ids, "stop"))
    assert text_of(responses) == "stop here"
    assert ids_of(responses) == ids
    assert responses[-1].finish_reason == pb.FINISH_REASON_STOP
    assert text_of(run(assemble(), events(ids, "length"))) == "stop here now"


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_a_stop_string_ends_text_and_ids(assemble: Assemble, tokenizer: Tokenizer, batch: int) -> None:
    ids = tokenizer.encode("alpha beta gamma delta epsilon")
    assembler = assemble(stop=["ma del", "never"])
    responses = run(assembler, events(ids), batch)
    assert text_of(responses) == "alpha beta gam"
    used = ids_of(responses)
    assert used == ids[: len(used)]
    assert "ma del" in tokenizer.decode(used)
    assert "ma del" not in tokenizer.decode(used[:-1])
    assert responses[-1].finish_reason == pb.FINISH_REASON_STOP
    assert responses[-1].usage.completion_tokens == len(used) == assembler.tokens < len(ids)
    assert assembler.push(events(ids, start=len(used))) is None


def test_text_held_for_a_stop_string_comes_at_the_end(assemble: Assemble, tokenizer: Tokenizer) -> None:
    responses = run(assemble(stop=["beta gamma"]), events(tokenizer.encode("alpha beta"), "length"))
    assert text_of(responses) == "alpha beta"
    assert responses[-1].finish_reason == pb.FINISH_REASON_LENGTH


def test_a_stop_string_completed_by_the_last_token_wins(assemble: Assemble, tokenizer: Tokenizer) -> None:
    responses = run(assemble(stop=[" beta"]), events(tokenizer.encode("alpha beta"), "length"))
    assert text_of(responses) == "alpha"
    assert responses[-1].finish_reason == pb.FINISH_REASON_STOP


def test_stop_strings_wait_for_min_tokens(assemble: Assemble, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" x x x x x")
    assert len(ids) == 5
    responses = run(assemble(stop=["x"], min_tokens=3), events(ids))
    assert text_of(responses) == " x x x "
    assert ids_of(responses) == ids[:4]


def test_logprobs_go_with_their_tokens(assemble: Assemble, tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("ab 龘"), tokenizer.eos_token_ids[0]]
    all_events = [
        TokenEvent("r1", at, token, logprob=-0.5 * at, top=(Logprob(token, -0.5 * at), Logprob(0, -9.0)))
        for at, token in enumerate(ids)
    ]
    all_events[-1] = TokenEvent("r1", len(ids) - 1, ids[-1], logprob=-1.0, finish="stop")
    responses = run(assemble(logprobs=True, top_logprobs=2), all_events, batch=2)
    for response in responses:
        assert [entry.token_id for entry in response.logprobs] == list(response.token_ids)
    entries = [entry for response in responses for entry in response.logprobs]
    assert [entry.text for entry in entries] == [tokenizer.token_text(token) for token in ids]
    assert [(other.token_id, other.text, other.logprob) for other in entries[1].top] == [
        (ids[1], tokenizer.token_text(ids[1]), -0.5),
        (0, tokenizer.token_text(0), -9.0),
    ]
    assert entries[-1].text == tokenizer.token_text(ids[-1])


def test_logprobs_are_sent_only_if_asked_for(assemble: Assemble, tokenizer: Tokenizer) -> None:
    responses = run(assemble(), events(tokenizer.encode("a b"), "length", logprob=-1.0))
    assert not any(response.logprobs for response in responses)


@pytest.mark.parametrize(
    "bad",
    [
        [TokenEvent("r1", 1, 5)],
        [TokenEvent("r1", 0, 5), TokenEvent("r1", 0, 5)],
        [TokenEvent("r1", 0, 5, finish="bored")],
    ],
    ids=["missing", "repeated", "unknown end"],
)
def test_a_broken_stream_is_an_error(assemble: Assemble, bad: list[TokenEvent]) -> None:
    with pytest.raises(ProtocolError):
        assemble().push(bad)


def test_a_missing_logprob_is_an_error(assemble: Assemble) -> None:
    with pytest.raises(ProtocolError, match="no log-probability"):
        assemble(logprobs=True).push([TokenEvent("r1", 0, 5)])


def test_an_unfinished_stream_has_no_last_response(assemble: Assemble, tokenizer: Tokenizer) -> None:
    assembler = assemble()
    assert assembler.push([]) is None
    assembler.push(events(tokenizer.encode("a b")))
    assert not assembler.finished
    with pytest.raises(ProtocolError, match="unfinished"):
        assembler.finish(LEDGER)


def test_the_ledger_keeps_its_order_and_its_sum() -> None:
    ledger = ledger_to_proto(LEDGER)
    assert [stage.name for stage in ledger.stages] == list(STAGES)
    assert sum(stage.seconds for stage in ledger.stages) == pytest.approx(ledger.total_s)
    assert (ledger.transfer_busy_s, ledger.transfer_exposed_s, ledger.transfer_hidden_share) == (0.5, 0.125, 0.75)
    assert (ledger.transfer_bytes, ledger.codec, ledger.transport) == (1234, "lossless", "nixl")


def test_every_finish_reason_has_a_value() -> None:
    assert set(FINISH_REASONS) == set(FinishReason)
    assert len(set(FINISH_REASONS.values()) - {pb.FINISH_REASON_UNSPECIFIED}) == len(FinishReason)
