"""What leaves the stream when: characters whole, spaces right, nothing held without need."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.text import CHARACTER_TOKENS, REPLACEMENT, Detokenizer, StopStrings, Tokenizer


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def test_words_come_with_their_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello there, my friend")
    assert pieces(tokenizer, ids) == [*(tokenizer.token_text(token) for token in ids), ""]


def test_a_character_of_several_tokens_comes_with_its_last(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("龘")
    assert len(ids) > 1
    assert pieces(tokenizer, ids) == [""] * (len(ids) - 1) + ["龘", ""]


def test_an_unfinished_character_is_replaced_at_the_end_only(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x🙂")[:-1]
    assert pieces(tokenizer, ids)[-1] == "\ufffd"
    assert "".join(pieces(tokenizer, ids)) == "x\ufffd"


def test_special_and_unknown_tokens_have_no_text_and_do_not_split_characters(tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_token_ids[0]
    first, *rest = tokenizer.encode("龘")
    assert "".join(pieces(tokenizer, [end, first, end, tokenizer.vocab_size + 5, *rest, end])) == "龘"


def test_the_space_at_the_start_is_dropped_and_no_other(byte_fallback: Tokenizer) -> None:
    ids = byte_fallback.encode("a b ab")
    assert pieces(byte_fallback, ids) == ["a", " b", " ab", ""]


def test_a_run_of_byte_tokens_comes_when_it_ends(byte_fallback: Tokenizer) -> None:
    ids = byte_fallback.encode("a🙂b")
    assert [byte_fallback.is_byte(token) for token in ids] == [False, True, True, True, True, False]
    assert pieces(byte_fallback, ids) == ["a", "", "", "", "", "🙂b", ""]
    assert pieces(byte_fallback, ids[:-1])[-1] == "🙂"


def test_an_invalid_byte_changes_its_whole_run_and_nothing_was_returned_before(byte_fallback: Tokenizer) -> None:
    whole = byte_fallback.encode("a🙂")
    broken = [*whole, 3 + 0xFF, *byte_fallback.encode("b")]
    assert "".join(pieces(byte_fallback, broken)) == byte_fallback.decode(broken) == "a" + "\ufffd" * 5 + " b"


@pytest.mark.parametrize("text", ["plain words and more of them", "龘🙂", REPLACEMENT, None])
def test_work_per_token_does_not_grow(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    lone = next(token for token in range(tokenizer.vocab_size) if tokenizer.token_text(token) == REPLACEMENT)
    ids = (tokenizer.encode(text) if text else [lone]) * 200
    decode, decoded = tokenizer.decode, []

    def counting(window: Sequence[int]) -> str:
        decoded.append(len(window))
        return decode(window)

    monkeypatch.setattr(tokenizer, "decode", counting)
    pieces(tokenizer, ids)
    assert max(decoded) <= 2 * CHARACTER_TOKENS + 1
    assert len(decoded) <= 2 * len(ids) + 2


def test_stop_string_across_pieces() -> None:
    stops = StopStrings(["STOP"])
    assert [stops.push(piece) for piece in ("go S", "T", "OP now")] == [("go ", False), ("", False), ("", True)]
    assert stops.flush() == ""
    assert stops.push("more") == ("", True)


def test_a_false_start_is_given_back() -> None:
    stops = StopStrings(["STOP"])
    assert [stops.push(piece) for piece in ("STO", "RE", " ST")] == [("", False), ("STORE", False), (" ", False)]
    assert stops.flush() == "ST"


def test_a_stop_string_that_overlaps_itself() -> None:
    stops = StopStrings(["aab"])
    assert [stops.push(piece) for piece in ("a", "a", "a", "b")] == [("", False), ("", False), ("a", False), ("", True)]


def test_the_longest_of_those_complete_at_once_counts() -> None:
    assert StopStrings(["\n", "\n\n"]).push("a\n\nb") == ("a", True)
    assert StopStrings(["b", "ab"]).push("xab") == ("x", True)
    assert StopStrings(["abcd", "c"]).push("abcd") == ("ab", True)


def test_without_stop_strings_everything_passes() -> None:
    stops = StopStrings([])
    assert stops.push("text") == ("text", False)
    assert stops.flush() == ""
