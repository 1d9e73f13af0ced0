"""From command-line words to requests, and from responses to an answer."""

from __future__ import annotations

import io

import pytest

from baton.errors import Internal
from baton.wire import inference_pb2 as pb
from deploy import talk

LEDGER = pb.StageLedger(
    stages=[pb.StageLedger.Stage(name="prefill", seconds=0.2), pb.StageLedger.Stage(name="decode", seconds=0.3)],
    total_s=0.5,
    transfer_busy_s=0.1,
    transfer_bytes=4096,
    codec="raw",
    transport="tcp",
)
LAST = pb.GenerateResponse(
    token_ids=[3],
    text="!",
    finish_reason=pb.FINISH_REASON_STOP,
    usage=pb.Usage(prompt_tokens=5, completion_tokens=3, total_tokens=8),
    ledger=LEDGER,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_text_is_written_as_it_comes_and_the_answer_has_everything() -> None:
    out = io.StringIO()
    seen: list[str] = []

    def responses() -> object:
        yield pb.GenerateResponse(token_ids=[1], text="Hello")
        seen.append(out.getvalue())
        yield pb.GenerateResponse(token_ids=[2])
        yield pb.GenerateResponse(text=" you")
        seen.append(out.getvalue())
        yield LAST

    answer = talk.stream(responses(), out)  # type: ignore[arg-type]
    assert seen == ["Hello", "Hello you"]
    assert out.getvalue() == "Hello you!\n"
    assert (answer.text, answer.finish) == ("Hello you!", "stop")
    assert (answer.prompt_tokens, answer.completion_tokens) == (5, 3)
    assert answer.tokens_per_s > 0.0
    assert answer.ledger.stages == {"prefill": 0.2, "decode": 0.3}
    assert (answer.ledger.codec, answer.ledger.transport, answer.ledger.transfer_bytes) == ("raw", "tcp", 4096)


def test_a_single_token_has_no_rate() -> None:
    assert talk.stream([LAST], io.StringIO()).tokens_per_s == 0.0


def test_a_stream_without_an_end_is_an_error() -> None:
    with pytest.raises(Internal, match="without a finish reason"):
        talk.stream([pb.GenerateResponse(token_ids=[1], text="Hel")], io.StringIO())


@pytest.mark.parametrize(("out", "shown"), [(Terminal(), "a\ufffd[2Jb\tc\n!\n"), (io.StringIO(), "a\x1b[2Jb\tc\n!\n")])
def test_output_cannot_drive_the_terminal_but_files_get_it_unchanged(out: io.StringIO, shown: str) -> None:
    talk.stream([pb.GenerateResponse(text="a\x1b[2Jb\tc\n"), LAST], out)
    assert out.getvalue() == shown


def test_options_not_given_are_left_to_the_service() -> None:
    how = talk.sampling(max_tokens=7, temperature=None, top_p=None, seed=0, stop=["x"])
    assert not how.HasField("temperature")
    assert not how.HasField("top_p")
    assert how.HasField("seed")
    assert (how.max_tokens, how.seed, list(how.stop)) == (7, 0, ["x"])


def test_requests_carry_turns_or_raw_text() -> None:
    how = talk.sampling(max_tokens=None, temperature=0.0, top_p=None, seed=None, stop=())
    chat = talk.chat_request([*talk.opening("be brief"), ("user", "hi")], how, "int8")
    assert [(turn.role, turn.content) for turn in chat.chat.messages] == [("system", "be brief"), ("user", "hi")]
    assert chat.handoff.codec == "int8"
    raw = talk.raw_request("once", how, None)
    assert raw.WhichOneof("input") == "prompt"
    assert raw.handoff.codec == ""
    assert talk.opening(None) == []
