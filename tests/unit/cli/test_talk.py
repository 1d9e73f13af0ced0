"""From a stream's parts to what is shown, and to an answer."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from baton.client import Part, Usage
from baton.errors import Internal
from baton.ledger import Ledger
from baton.request import FinishReason
from deploy import talk

LEDGER = Ledger(
    total_s=0.5, stages={"prefill": 0.2, "decode": 0.3}, transfer_busy_s=0.1, transfer_bytes=4096, codec="raw"
)
LAST = Part(0, "!", (3,), finish=FinishReason.STOP, usage=Usage(5, 3), ledger=LEDGER)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_text_is_written_as_it_comes_and_the_answer_has_everything() -> None:
    out = io.StringIO()
    seen: list[str] = []

    def parts() -> Iterator[Part]:
        yield Part(0, "Hello", (1,))
        seen.append(out.getvalue())
        yield Part(0, "", (2,))
        yield Part(0, " you", ())
        seen.append(out.getvalue())
        yield LAST

    answer = talk.stream(parts(), out)
    assert seen == ["Hello", "Hello you"]
    assert out.getvalue() == "Hello you!\n"
    assert (answer.text, answer.finish) == ("Hello you!", "stop")
    assert (answer.prompt_tokens, answer.completion_tokens) == (5, 3)
    assert answer.tokens_per_s > 0.0
    assert answer.ledger is LEDGER


def test_a_single_token_has_no_rate() -> None:
    assert talk.stream([LAST], io.StringIO()).tokens_per_s == 0.0


def test_a_stream_without_an_end_is_an_error() -> None:
    with pytest.raises(Internal, match="without a finish reason"):
        talk.stream([Part(0, "Hel", (1,))], io.StringIO())


@pytest.mark.parametrize(("out", "shown"), [(Terminal(), "a\ufffd[2Jb\tc\n!\n"), (io.StringIO(), "a\x1b[2Jb\tc\n!\n")])
def test_output_cannot_drive_the_terminal_but_files_get_it_unchanged(out: io.StringIO, shown: str) -> None:
    talk.stream([Part(0, "a\x1b[2Jb\tc\n", ()), LAST], out)
    assert out.getvalue() == shown


def test_a_conversation_opens_with_the_system_message_if_there_is_one() -> None:
    assert talk.opening(None) == []
    assert talk.opening("be brief") == [("system", "be brief")]
