"""Which tokens of which layers have been seen: each exactly once, or the handoff is refused."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens ``[start, start + count)`` of one layer."""

    layer: int
    start: int
    count: int


class Coverage:
    """Which (layer, token) pairs have been seen, as sorted disjoint intervals per layer; each may be seen once."""

    def __init__(self, layers: int, tokens: int) -> None:
        self._tokens = tokens
        self._starts: list[list[int]] = [[] for _ in range(layers)]
        self._ends: list[list[int]] = [[] for _ in range(layers)]
        self._missing = layers * tokens

    @property
    def tokens(self) -> int:
        """Of every layer, seen or not."""
        return self._tokens

    @property
    def missing(self) -> int:
        """(layer, token) pairs not yet seen."""
        return self._missing

    def add(self, span: Span) -> str:
        """Marks ``span`` as seen and returns "", or changes nothing and returns why it is refused."""
        layer, start, end = span.layer, span.start, span.start + span.count
        if not 0 <= layer < len(self._starts):
            return f"layer {layer} of {len(self._starts)}"
        if not (0 <= start < end <= self._tokens):
            return f"tokens [{start}, {end}) of {self._tokens}"
        starts, ends = self._starts[layer], self._ends[layer]
        at = bisect_right(starts, start)
        if (at > 0 and ends[at - 1] > start) or (at < len(starts) and starts[at] < end):
            return f"tokens [{start}, {end}) of layer {layer} overlap ones already sent"
        self._missing -= span.count
        joins_left = at > 0 and ends[at - 1] == start
        joins_right = at < len(starts) and starts[at] == end
        if joins_left and joins_right:
            ends[at - 1] = ends.pop(at)
            starts.pop(at)
        elif joins_left:
            ends[at - 1] = end
        elif joins_right:
            starts[at] = start
        else:
            starts.insert(at, start)
            ends.insert(at, end)
        return ""
