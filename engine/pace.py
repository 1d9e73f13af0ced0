"""How much prompt a step may hold while it also decodes, from what steps have cost so far. Pure: seconds come in.

A stream's gap between two tokens is one step. A step that also computes ``n`` prompt tokens takes about
``decode_s + n * token_s``, so ``n = decode_s / token_s`` doubles the gap, whatever the hardware. That is the trade-off:
prompts meanwhile get half of the time, and their first token comes about twice as late as without any streams.
"""

from __future__ import annotations

from collections import deque
from statistics import median

STRETCH = 0.8  # of a decode step's time goes to prompts on top of it: with noise the gap stays below twice
BLOCK_TOKENS = 16  # rows that matrix kernels compute at one go: a part of that costs as much
REMEMBERED = 9  # steps of each kind; their median ignores a hiccup and follows growing contexts


class Pace:
    """Learns from every step. Until it has seen both kinds it answers ``first`` tokens."""

    def __init__(self, *, first: int = 64) -> None:
        self._first = first
        self._decode_s: deque[float] = deque(maxlen=REMEMBERED)
        self._token_s: deque[float] = deque(maxlen=REMEMBERED)

    def observe(self, decodes: int, prompt_tokens: int, step_s: float) -> None:
        """A step that took ``step_s`` seconds gave one token to each of ``decodes`` streams and computed
        ``prompt_tokens`` tokens of prompts."""
        if not prompt_tokens:
            self._decode_s.append(step_s)
            return
        if decodes and not self._decode_s:
            return  # no telling which part of it the prompt took
        rest_s = step_s - median(self._decode_s) if decodes else step_s
        # A part of a block costs a block; a mixed step that was faster than a plain one says that prompts are cheap.
        blocks = -(-prompt_tokens // BLOCK_TOKENS)
        self._token_s.append(max(rest_s, 0.0) / (blocks * BLOCK_TOKENS))

    def mixed_tokens(self, most: int) -> int:
        """Prompt tokens for a step that also decodes: whole blocks, at least one, at most ``most`` tokens."""
        if not (self._decode_s and self._token_s):
            return min(self._first, most)
        spare_s, token_s = STRETCH * median(self._decode_s), median(self._token_s)
        if token_s * most <= spare_s:
            return most
        return min(most, max(1, int(spare_s / token_s) // BLOCK_TOKENS) * BLOCK_TOKENS)
