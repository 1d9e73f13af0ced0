"""Text to token ids and back: tokenizer, streaming detokenizer, stop strings.

Every object here works on one model folder in Hugging Face form. A :class:`Tokenizer` is shared by all threads; a
:class:`Detokenizer` and a :class:`StopStrings` belong to one stream.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from baton.errors import InvalidRequest

REPLACEMENT = "\ufffd"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
WORD_START = "\u2581"  # SentencePiece's space
CHARACTER_TOKENS = 4  # a UTF-8 character has at most 4 bytes, and a visible token at least one


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's visible character for each byte: its own where that can be seen, else one from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + at): byte for at, byte in enumerate(hidden)}


BYTE_OF = _byte_alphabet()


class Tokenizer:
    """The tokenizer and chat template in ``folder``, with the model's end-of-turn tokens.

    Encoding equals ``transformers.AutoTokenizer`` called on the text. It goes to the compiled tokenizer directly,
    because transformers' call sets padding and truncation on it each time, which fails when two threads do so at once.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer  # seconds to import: paid by who makes a tokenizer, not who imports us

        self._transformers: Any = AutoTokenizer.from_pretrained(str(folder))
        self._compiled: Any = self._transformers.backend_tokenizer
        self._compiled.no_truncation()
        self._compiled.no_padding()
        config = _read_json(folder / "config.json")
        vocabulary: dict[str, int] = self._compiled.get_vocab(with_added_tokens=True)
        added = self._compiled.get_added_tokens_decoder()
        special = {token for token, entry in added.items() if entry.special}
        self.vocab_size: int = config.get("vocab_size") or max(vocabulary.values()) + 1
        """Rows of the model's embedding: ids are in [0, vocab_size), some of which may have no text."""
        self.eos_token_ids: tuple[int, ...] = _eos_token_ids(folder, config, self._transformers.eos_token_id)
        """End-of-turn tokens, ascending."""
        self.max_token_chars: int = max(map(len, vocabulary))
        """No token covers more characters of a text than this."""
        self._visible = frozenset(vocabulary.values()) - special
        self._added = frozenset(added)
        self._byte_level = self._spells_bytes(vocabulary)
        self._bytes = self._byte_fallback(vocabulary)
        self._joins_bytes = str(self._compiled.decoder.__getstate__()).startswith('b\'{"type":"ByteLevel"')
        self.width = lru_cache(maxsize=None)(self._width)
        """Characters of one token's text by itself; at most a vocabulary's worth is remembered."""
        self.alone = lru_cache(maxsize=None)(self._alone)
        """What a token adds to any text whose characters are complete; None where that depends on the text."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with special tokens where the model's tokenizer adds them."""
        return list(self._compiled.encode(text).ids)

    def chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a conversation of (role, content), rendered with the chat template up to the assistant's turn.

        Raises :class:`InvalidRequest` when the model has no template or its template refuses the conversation.
        """
        if not self._transformers.chat_template:
            raise InvalidRequest("chat", "this model has no chat template; send a prompt instead")
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            text = self._transformers.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise InvalidRequest("chat.messages", f"the model's chat template refuses them: {error}") from None
        return list(self._compiled.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ``ids``, special tokens only if asked for; ids that have no text are skipped."""
        return str(self._compiled.decode(ids, skip_special_tokens=not special))

    def token_text(self, token: int) -> str:
        """Text of one token by itself, special tokens included; part of a character reads as U+FFFD."""
        return str(self._compiled.decode([token], skip_special_tokens=False))

    def token_bytes(self, token: int) -> bytes:
        """The bytes that ``token`` stands for; those of a text's tokens joined are the text in UTF-8.

        Where decoding drops a leading space, the first token still has it. Ids without a token have no bytes.
        """
        piece = self._compiled.id_to_token(token)
        if piece is None:
            return b""
        if token in self._bytes:
            return bytes([int(piece[len("<0x") : -1], 16)])
        if token in self._added:
            return str(piece).encode()
        if self._byte_level:
            return bytes(BYTE_OF[character] for character in piece)
        return str(piece).replace(WORD_START, " ").encode()

    def _width(self, token: int) -> int:
        return len(self.decode([token]))

    def _alone(self, token: int) -> str | None:
        text = self.decode([token]) if self._joins_bytes else REPLACEMENT
        return None if REPLACEMENT in text else text

    def is_visible(self, token: int) -> bool:
        """Whether ``token`` has text in an output: it exists and is not special."""
        return token in self._visible

    def is_byte(self, token: int) -> bool:
        """Whether ``token`` stands for one byte whose character depends on the byte tokens around it."""
        return token in self._bytes

    def _spells_bytes(self, vocabulary: dict[str, int]) -> bool:
        """Whether tokens are written in the alphabet of bytes, as those of GPT-2 are."""
        return '"ByteLevel"' in str(self._compiled.decoder.__getstate__()) and all(
            set(token) <= BYTE_OF.keys() for token, index in vocabulary.items() if index not in self._added
        )

    def _byte_fallback(self, vocabulary: dict[str, int]) -> frozenset[int]:
        """Ids of byte tokens, if the decoder gives them that meaning."""
        present = frozenset(vocabulary[name] for name in BYTE_TOKENS if name in vocabulary)
        probe = vocabulary.get("<0x41>")
        return present if probe is not None and self.token_text(probe) == "A" else frozenset()


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _eos_token_ids(folder: Path, config: dict[str, Any], tokenizer_eos: int | None) -> tuple[int, ...]:
    found: set[int] = set()
    for value in (
        config.get("eos_token_id"),
        _read_json(folder / "generation_config.json").get("eos_token_id"),
        tokenizer_eos,
    ):
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(found))


class Detokenizer:
    """Text of one output as its tokens come; all pieces together equal ``tokenizer.decode`` of all tokens.

    A token's text can depend on the token before it (a leading space is dropped at the start of a text), so each
    token is decoded after a short window of earlier ones and only what it adds is returned. Text is decided up to the
    last character; that one is held while it reads as U+FFFD, since it may be the first bytes of a character. A run
    of byte-fallback tokens is held until it ends, because one invalid byte changes what the whole run reads as.

    Each token is decoded a fixed number of times: the window is cut back to the last token whenever all text is
    decided, and to the tokens that one character can span otherwise. Where a tokenizer only joins its tokens' bytes,
    most tokens are whole characters, whose text was looked up before.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._returned = 0  # characters of the window's text that were returned
        self._run: list[int] = []  # byte-fallback tokens after the window
        self._undecided = False  # the window's last character

    def push(self, token: int) -> str:
        """The text that ``token`` decides; empty while nothing is."""
        if not self._tokenizer.is_visible(token):
            return ""
        if not self._undecided and (text := self._tokenizer.alone(token)) is not None:
            self._window, self._returned = [token], len(text)
            return text
        self._run.append(token)
        if self._tokenizer.is_byte(token):
            return ""
        return self._advance(final=False)

    def flush(self) -> str:
        """The text still held, at the end of the output. An unfinished character reads as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        self._window += self._run
        self._run = []
        text = self._tokenizer.decode(self._window)
        self._undecided = not final and text.endswith(REPLACEMENT)
        end = len(text) - 1 if self._undecided else len(text)
        piece, self._returned = text[self._returned : end], max(end, self._returned)
        if not self._undecided:
            self._window = self._window[-1:]
            self._returned = self._tokenizer.width(self._window[0]) if self._window else 0
        elif len(self._window) > 2 * CHARACTER_TOKENS:
            self._window = self._window[-CHARACTER_TOKENS:]
            self._returned = len(self._tokenizer.decode(self._window)) - 1  # the last character is held
        return piece


class StopStrings:
    """Finds the first of some strings in a text that comes in pieces, and holds back only what may be part of one."""

    def __init__(self, stops: Iterable[str]) -> None:
        """``stops``: non-empty strings; none at all lets every text through at once."""
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._matched = False

    def push(self, delta: str) -> tuple[str, bool]:
        """The text that is now decided, and whether a stop string follows it. After a match there is no more text.

        Of several stop strings the one that is complete first counts, and of those complete at once the longest, so
        that the result does not depend on how the text was cut into pieces.
        """
        if self._matched or not self._stops:
            return ("", True) if self._matched else (delta, False)
        text = self._held + delta
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held, self._matched = "", True
            return text[: min(found)[1]], True
        keep = self._keep(text)
        self._held = text[keep:]
        return text[:keep], False

    def flush(self) -> str:
        """The text still held, at the end of the output: no stop string was completed."""
        held, self._held = self._held, ""
        return held

    def _keep(self, text: str) -> int:
        """Where the earliest suffix of ``text`` begins that is the beginning of a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)
