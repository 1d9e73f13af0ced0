"""Streaming text against the slow way: decoding, or searching, the whole output at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text import REPLACEMENT, Detokenizer, StopStrings, Tokenizer

TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="你好，世界。漢字龘𠮷", max_size=40),
    st.text(alphabet="🙂👩‍👩‍👧‍👦🏳️‍🌈é\u0301 \n", max_size=40),
    st.text(alphabet=" ab \t", max_size=40),
)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_ids_stream_to_the_text_of_all(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def partial_tokens(tokenizer: Tokenizer) -> list[int]:
    """Tokens that begin or end inside a character."""
    return [token for token in range(tokenizer.vocab_size) if REPLACEMENT in tokenizer.token_text(token)]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_byte_pieces_stream_to_the_text_of_all(
    tokenizer: Tokenizer, partial_tokens: list[int], data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.sampled_from([*partial_tokens, *tokenizer.encode("a b")]), max_size=60))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_text_is_never_cut_inside_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)  # characters that the vocabulary cannot spell are lost here
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if REPLACEMENT not in tokenizer.decode(ids):
        assert not any(REPLACEMENT in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_ids_with_byte_fallback(byte_fallback: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, byte_fallback.vocab_size + 3), max_size=40))
    assert "".join(streamed(byte_fallback, ids)) == byte_fallback.decode(ids)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_text_with_byte_fallback(byte_fallback: Tokenizer, text: str) -> None:
    ids = byte_fallback.encode(text)
    pieces = streamed(byte_fallback, ids)
    assert "".join(pieces) == byte_fallback.decode(ids)
    if REPLACEMENT not in byte_fallback.decode(ids):
        assert not any(REPLACEMENT in piece for piece in pieces)


STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4)


def cut_at_once(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, the longest of those complete at once."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=500)
@given(st.lists(st.text(alphabet="ab\n", max_size=4), max_size=12), STOPS)
def test_stop_strings_do_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    stream, out, matched = StopStrings(stops), "", False
    for piece in pieces:
        text, matched = stream.push(piece)
        out += text
    out += stream.flush()
    assert (out, matched) == cut_at_once("".join(pieces), stops)


@settings(max_examples=500)
@given(st.lists(st.text(alphabet="ab\n", max_size=4), max_size=12), STOPS)
def test_only_what_can_begin_a_stop_string_is_held(pieces: list[str], stops: list[str]) -> None:
    stream, seen, out = StopStrings(stops), "", ""
    for piece in pieces:
        text, matched = stream.push(piece)
        seen, out = seen + piece, out + text
        if matched:
            return
        held = seen[len(out) :]
        assert seen.startswith(out)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@pytest.mark.parametrize("token_count", [2_000])
def test_undecodable_output_is_not_buffered(tokenizer: Tokenizer, partial_tokens: list[int], token_count: int) -> None:
    """Lone bytes that never form a character are returned as they come, one behind."""
    lone = next(token for token in partial_tokens if tokenizer.token_text(token) == REPLACEMENT)
    detokenizer, longest = Detokenizer(tokenizer), 0
    returned = 0
    for count in range(1, token_count + 1):
        returned += len(detokenizer.push(lone))
        longest = max(longest, count - returned)
    assert longest <= 1
