"""A stream of an answer's parts, shown as they come."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TextIO

from baton.client import Part, Turn
from baton.errors import Internal
from baton.ledger import Ledger

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


def opening(system: str | None) -> list[Turn]:
    """The conversation before anyone spoke."""
    return [] if system is None else [("system", system)]


def stream(parts: Iterable[Part], out: TextIO) -> Answer:
    """Writes the text to ``out`` as it comes. Raises :class:`Internal` when the stream ends without a last part."""
    safe = _UNPRINTABLE if out.isatty() else {}
    text: list[str] = []
    first_s = last_s = 0.0
    for part in parts:
        if part.token_ids:
            last_s = time.monotonic()
            first_s = first_s or last_s
        if part.text:
            text.append(part.text)
            out.write(part.text.translate(safe))
            out.flush()
        if part.finish and part.usage and part.ledger:
            out.write("\n")
            out.flush()
            return Answer(
                text="".join(text),
                finish=part.finish,
                prompt_tokens=part.usage.prompt_tokens,
                completion_tokens=part.usage.completion_tokens,
                decode_s=last_s - first_s,
                ledger=part.ledger,
            )
    raise Internal("the stream ended without a finish reason")
