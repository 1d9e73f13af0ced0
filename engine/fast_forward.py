"""Runs of plain decode steps taken as a whole, for callers that need no block tables: simulators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.pages import PagePool
from engine.scheduler import Scheduler
from engine.sequence import Job, Sequence, Slice, Timing


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """The next ``steps`` steps give one token to each of ``contexts``'s sequences and do nothing else.

    ``contexts`` are the tokens that each sequence's query attends to in the first of them; each grows by one a step.
    """

    contexts: tuple[int, ...]
    steps: int


class FastForward(Scheduler):
    """A scheduler that can also be told of many steps at once. Everything ends as if it had been told of each.

    While a run goes on its sequences are told nothing: how many steps they are behind is one number for all of them,
    and how many pages these took follows from how full their last ones were.
    """

    def __init__(
        self, pool: PagePool, *, step_tokens: int, max_running: int, max_waiting: int, mixed_tokens: int | None = None
    ) -> None:
        super().__init__(
            pool, step_tokens=step_tokens, max_running=max_running, max_waiting=max_waiting, mixed_tokens=mixed_tokens
        )
        self._cycle: list[int] = []  # of a run: pages taken by its n-th step, modulo a page's tokens, the first aside
        self._behind = 0  # steps of the run that the sequences do not know of
        self._first_s = 0.0  # when the first of these ended
        self._taken: list[int] = []  # pages for these and the step under way

    def decode_run(self, now_s: float) -> DecodeRun | None:
        """Begins the next step if that, and perhaps more, is a plain decode of one fixed batch; None if it is not.

        The run ends before a sequence would pass its ``max_tokens`` or the free pages would run out. It holds until
        something is added, started or released. Like ``schedule`` it takes the pages of its first step.
        """
        self._catch_up()
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
        self._hand_out(growing)
        for sequence in fresh:
            sequence.scheduled_s = now_s
        self._cycle = [slacks[0] + slacks[page_tokens], *slacks[1:page_tokens]]
        return DecodeRun(tuple(contexts), steps)

    def skip(self, steps: int, first_s: float, *, goes_on: bool) -> list[str]:
        """``steps`` steps of the current :meth:`decode_run` were computed, the first by ``first_s``.

        ``goes_on`` says that the run's next step has begun. Returns the sequences that reached their ``max_tokens``.
        """
        if not self._behind:
            self._first_s = first_s
        if goes_on:
            done, cycle = self._behind, self._cycle
            wanted = sum([cycle[step % len(cycle)] for step in range(done + 1, done + steps + 1)])
            self._taken += self.pool.take(wanted)
            self._behind += steps
            return []
        self._behind += steps
        self._catch_up(held=-1)
        self._cycle = []
        return [sequence.job.request_id for sequence in self._running if sequence.known >= sequence.full_at]

    def mixed(self, now_s: float) -> tuple[list[Sequence], tuple[Slice, ...]]:
        """The next step as :meth:`schedule` has it, but for its decodes the sequences: they need no block tables."""
        decodes, prompts = [], []
        for sequence, count in self._choose(now_s):
            if sequence.decodes:
                decodes.append(sequence)
            else:
                prompts.append(sequence.slice(count))
        return decodes, tuple(prompts)

    def give(self, decodes: list[Sequence], now_s: float) -> list[str]:
        """Each of ``decodes``, of the current :meth:`mixed` step, has its next token. Returns those with all theirs."""
        full = []
        for sequence in decodes:
            sequence.computed = sequence.known
            sequence.known = known = sequence.known + 1
            if sequence.keys:
                self.holdings.publish(sequence)
            if sequence.first_token_s is None:
                sequence.first_token_s = now_s
            if known >= sequence.full_at:
                full.append(sequence.job.request_id)
        return full

    def full(self, request_id: str) -> bool:
        """Whether the sequence has all the tokens that it asked for."""
        sequence = self._get(request_id)
        return sequence.known >= sequence.full_at

    # What is done step by step in the scheduler must find the sequences as they are.

    def release(self, request_id: str) -> bool:
        self._catch_up()
        return super().release(request_id)

    def outputs(self, request_id: str) -> int:
        self._catch_up()
        return super().outputs(request_id)

    def timing(self, request_id: str) -> Timing:
        self._catch_up()
        return super().timing(request_id)

    @property
    def waiting_tokens(self) -> int:
        return sum([s.known - s.found for s in self._waiting]) if self._cycle else super().waiting_tokens

    def check_integrity(self) -> None:
        self._catch_up()
        super().check_integrity()

    def _choose(self, now_s: float) -> list[tuple[Sequence, int]]:
        self._catch_up()
        return super()._choose(now_s)

    def _victims(self, job: Job, enough: Callable[[list[Sequence]], bool]) -> list[Sequence] | None:
        self._catch_up()
        return super()._victims(job, enough)

    def _catch_up(self, held: int = 0) -> None:
        """Tells the sequences of the steps that they are behind. ``held``: tokens beyond the known that have pages."""
        steps, self._behind = self._behind, 0
        if not steps:
            return
        growing, page_tokens, first_s = list[Sequence](), self.pool.page_tokens, self._first_s
        for sequence in self._running:
            sequence.known = known = sequence.known + steps
            sequence.computed = known - 1
            if sequence.first_token_s is None:
                sequence.first_token_s = first_s
            if known + held > len(sequence.pages) * page_tokens:
                growing += [sequence] * (-(-(known + held) // page_tokens) - len(sequence.pages))
        self._hand_out(growing)

    def _hand_out(self, growing: list[Sequence]) -> None:
        """One page to each, in turn."""
        taken, self._taken = self._taken, []
        if growing:
            taken += self.pool.take(len(growing) - len(taken))
            for sequence, page in zip(growing, taken, strict=True):
                sequence.pages.append(page)

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
