"""How much prompt a step may hold while it also decodes, from what steps have cost so far. Pure: seconds come in.

A stream's gap between two tokens is one step, so a prompt's share of a step is bounded by time: with it the step may
take ``STRETCH`` times what it takes without, or ``gap_s`` seconds if that is longer. That is the trade-off. By the
first bound prompts get nearly half of the time while anyone decodes, and the fixed part of a step is paid again for
every share of a prompt; where steps are short beside a gap that nobody notices, the second lets them have more.

What a step costs is no line: matrix kernels work in blocks of rows, and some sizes leave the fast path. So nothing is
extrapolated far. The share begins at one block, at most doubles after a full step that was fast enough and shrinks at
once after one that was not. Whether that was the size or a busy machine, further tries tell: a size that is slow again
and again fails. The share stays below it for ``RETRY_STEPS`` steps; then one try shows whether it still is.
"""

from __future__ import annotations

from collections import defaultdict, deque
from statistics import median

STRETCH = 1.8  # of twice, which is promised; the rest is for noise
BLOCK_TOKENS = 16  # rows that matrix kernels compute at one go: a part of that costs as much
RETRY_STEPS = 256
TRIES, SLOW_TRIES = 5, 3  # a size fails when so many of its last tries were slow
REFRESH_STEPS = 64  # mixed steps in a row after which one without prompts is asked for: contexts and batches change
REMEMBERED = 9  # decode steps; their median ignores a hiccup and follows growing contexts


class Pace:
    """Learns from every step. ``gap_s``: seconds between two tokens of a stream that are always allowed."""

    def __init__(self, gap_s: float = 0.0) -> None:
        self._gap_s = gap_s
        self._decode_s: deque[float] = deque(maxlen=REMEMBERED)
        self._mixed_steps = 0  # since the last one without prompts
        self._share = BLOCK_TOKENS
        self._tries: defaultdict[int, deque[bool]] = defaultdict(lambda: deque(maxlen=TRIES))  # size -> was it slow
        self._failed: int | None = None  # the smallest size that fails
        self._steps_since = 0

    def mixed_tokens(self, most: int) -> int:
        """Prompt tokens for a step that also decodes: at least one block, at most ``most`` tokens.

        None where a step without prompts must first show what decodes alone take: under a backlog it would never come.
        """
        return min(self._share, most) if self._decode_s and self._mixed_steps < REFRESH_STEPS else 0

    def observe(self, decodes: int, prompt_tokens: int, step_s: float) -> None:
        """A step that took ``step_s`` seconds gave one token to each of ``decodes`` streams and computed
        ``prompt_tokens`` tokens of prompts."""
        if not prompt_tokens:
            self._decode_s.append(step_s)
            self._mixed_steps = 0
            return
        self._mixed_steps += decodes > 0
        if decodes and self._decode_s:
            self._learn(prompt_tokens, step_s, median(self._decode_s))

    def _learn(self, prompt_tokens: int, step_s: float, decode_s: float) -> None:
        self._steps_since += 1
        spare_s = max(STRETCH * decode_s, self._gap_s) - decode_s
        extra_s = max(step_s - decode_s, 1e-3 * decode_s)
        slow = extra_s > spare_s
        if slow or prompt_tokens >= self._share:  # a fast step with less than its share says nothing
            self._judge(prompt_tokens, slow)
            wanted = min(2.0 * prompt_tokens, prompt_tokens * spare_s / extra_s)
            self._share = self._below_failed(min(wanted, prompt_tokens - 1) if slow else max(self._share, wanted))

    def _judge(self, prompt_tokens: int, slow: bool) -> None:
        size = -(-prompt_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
        tries = self._tries[size]
        tries.append(slow)
        if sum(tries) >= SLOW_TRIES and slow and size > BLOCK_TOKENS:  # less than a block is never asked for
            self._failed, self._steps_since = size, 0
        elif not slow and self._failed is not None and size >= self._failed:
            self._failed = None

    def _below_failed(self, wanted: float) -> int:
        if self._failed is not None and wanted >= self._failed:
            wanted = self._failed if self._steps_since >= RETRY_STEPS else self._failed - 1
        return _blocks(wanted)


def _blocks(tokens: float) -> int:
    """Whole blocks within ``tokens``, but one at least."""
    return max(1, int(tokens) // BLOCK_TOKENS) * BLOCK_TOKENS
