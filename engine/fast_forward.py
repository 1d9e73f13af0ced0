"""Runs of plain decode steps taken as a whole, for callers that need no block tables: simulators."""

from __future__ import annotations

from dataclasses import dataclass

from engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """The next ``steps`` steps give one token to each of ``contexts``'s sequences and do nothing else.

    ``contexts`` are the tokens that each sequence's query attends to in the first of them; each grows by one a step.
    """

    contexts: tuple[int, ...]
    steps: int


class FastForward(Scheduler):
    """A scheduler that can also be told of many steps at once. Everything ends as if it had been told of each."""

    def decode_run(self, now_s: float) -> DecodeRun | None:
        """Begins the next step if that, and perhaps more, is a plain decode of one fixed batch; None if it is not.

        The run ends before a sequence would pass its ``max_tokens`` or the free pages would run out. It holds until
        something is added, started or released. Like ``schedule`` it takes the pages of its first step.
        """
        self._seat_ready()
        if not self._running or self._admits():
            return None
        page_tokens = self.pool.page_tokens
        steps, slacks = self._running[0].job.max_tokens, [0] * (page_tokens + 1)
        contexts, growing, fresh = [], [], []
        for sequence in self._running:
            known = sequence.known
            slack = len(sequence.pages) * page_tokens - sequence.computed
            if known - sequence.computed != 1 or known <= sequence.job.prompt_tokens:
                return None  # not a decode
            contexts.append(known)
            slacks[slack if slack < page_tokens else page_tokens] += 1
            if slack <= 0:
                growing.append(sequence)
            steps = sequence.full_at - known if sequence.full_at - known < steps else steps
            if sequence.scheduled_s is None:
                fresh.append(sequence)
        steps = _steps_until_full(slacks, self.pool.free, steps)
        if steps <= 0:
            return None
        for sequence in growing:
            sequence.pages += self.pool.take(1)
        for sequence in fresh:
            sequence.scheduled_s = now_s
        return DecodeRun(tuple(contexts), steps)

    def skip(self, steps: int, first_s: float, *, goes_on: bool) -> list[str]:
        """``steps`` steps of the current :meth:`decode_run` were computed, the first by ``first_s``.

        ``goes_on`` says that the run's next step has begun. Returns the sequences that reached their ``max_tokens``.
        """
        full, page_tokens = [], self.pool.page_tokens
        for sequence in self._running:
            sequence.known = known = sequence.known + steps
            sequence.computed = known - 1
            if sequence.first_token_s is None:
                sequence.first_token_s = first_s
            held = known if goes_on else known - 1
            if held > len(sequence.pages) * page_tokens:
                sequence.pages += self.pool.take(self.pool.pages_for(held) - len(sequence.pages))
            if known >= sequence.full_at:
                full.append(sequence.job.request_id)
        return full

    def _admits(self) -> bool:
        """Whether a waiting sequence could enter the next step, were all running ones decodes."""
        return bool(self._waiting) and (self._enters(self._waiting[0]) or bool(self._outranked()))


def _steps_until_full(slacks: list[int], free: int, wanted: int) -> int:
    """Steps, at most ``wanted``, for which ``free`` pages last.

    ``slacks[n]`` sequences have room for n more tokens in their last page. Every ``page_tokens`` steps each of them
    takes one page, so whole rounds are divided out first.
    """
    page_tokens = len(slacks) - 1
    rounds, left = divmod(free, sum(slacks))
    steps = rounds * page_tokens
    for step in range(min(page_tokens, wanted - steps)):
        left -= slacks[step]
        if left < 0:
            return steps + step
    return min(wanted, steps + page_tokens)
