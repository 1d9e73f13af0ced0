"""Checks of single values, each of which names the field that is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from baton.errors import InvalidRequest

SHOWN_CHARS = 64  # of a client's value in a message: details travel in a header of limited size


def check_range(field: str, value: float, least: float, most: float, *, what: str = "is {}", also: str = "") -> None:
    """NaN is in no range."""
    if not least <= value <= most:
        raise InvalidRequest(field, f"{what.format(value)}; allowed: {also}[{least}, {most}]")


def check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    for index, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise InvalidRequest(f"{field}[{index}]", f"is {token}; the vocabulary is [0, {vocab_size})")


def shown(text: str) -> str:
    """A client's text for a message, cut."""
    return repr(text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…")
