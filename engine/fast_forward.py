"""Decodes taken as one, for callers that need no block tables: simulators.

A batch of decodes changes little from step to step: every sequence has one token more, and whose last page is full
takes another. So what a step needs to know of them, how many they are, the sum of their contexts, who takes a page when
and who is done when, is kept as sums (:class:`_Batch`) from when they join until they leave, and a sequence itself is
told of its steps only when somebody looks at it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from engine.pages import PagePool
from engine.scheduler import Scheduler
from engine.sequence import Job, Sequence, Slice, Timing


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """The next ``steps`` steps give one token to each of ``decodes`` sequences and do nothing else.

    ``context`` is the sum of the tokens that their queries attend to in the first of them.
    """

    decodes: int
    context: int
    steps: int


@dataclass(frozen=True, slots=True)
class MixedStep:
    """One step: ``decodes`` sequences, as in :class:`DecodeRun`, and ``slices``."""

    decodes: int
    context: int
    slices: tuple[Slice, ...]


@dataclass(slots=True)
class _Batch:
    """Decodes that run. Time is the number of steps they were given; ``joined`` says when each was last told of it."""

    page_tokens: int
    now: int = 0
    context: int = 0  # sum of their known tokens
    paid: int = 0  # pages are there for all steps before this one
    joined: dict[Sequence, int] = field(default_factory=dict)
    fills: list[int] = field(init=False)  # how many take a page before the n-th step, modulo a page's tokens
    ends: list[tuple[int, tuple[int, int], Sequence]] = field(default_factory=list)  # a heap of when they are done
    fresh: list[Sequence] = field(default_factory=list)  # without a first token from here
    pages: list[int] = field(default_factory=list)  # taken for steps that sequences have not been told of

    def __post_init__(self) -> None:
        self.fills = [0] * self.page_tokens

    def join(self, sequence: Sequence) -> None:
        """``sequence`` decodes from the next step on; its pages have room for less than a page's tokens."""
        self.joined[sequence] = self.now
        self.context += sequence.known
        self.fills[self._fills_at(sequence)] += 1
        heappush(self.ends, (self._end(sequence), sequence.rank, sequence))
        if sequence.first_token_s is None:
            self.fresh.append(sequence)

    def leave(self, sequence: Sequence) -> None:
        self.tell(sequence)
        self.fills[self._fills_at(sequence)] -= 1
        self.context -= sequence.known
        if self._end(sequence) > self.now:  # else :meth:`done` took it out
            self.ends = [entry for entry in self.ends if entry[2] is not sequence]
            heapify(self.ends)
        del self.joined[sequence]
        if sequence in self.fresh:
            self.fresh.remove(sequence)

    def tell(self, sequence: Sequence) -> None:
        """Brings ``sequence`` up to now, with its pages for the step under way if there is one."""
        sequence.known += self.now - self.joined[sequence]
        sequence.computed = sequence.known - 1
        self.joined[sequence] = self.now
        room = sequence.computed + self.paid - self.now
        for _ in range(len(sequence.pages), -(-room // self.page_tokens)):
            sequence.pages.append(self.pages.pop())

    def wanted(self, until: int) -> int:
        """Pages that steps before ``until`` need and that were not taken yet."""
        rounds, rest = divmod(until - self.paid, self.page_tokens)
        first = self.paid % self.page_tokens
        some = self.fills[first : first + rest] + self.fills[: max(0, first + rest - self.page_tokens)]
        return rounds * len(self.joined) + sum(some)

    def steps(self, free: int) -> int:
        """Steps from now on until somebody is done, or ``free`` pages no longer suffice."""
        most = self.ends[0][0] - self.now
        if self.wanted(self.now + most) <= free:
            return most
        rounds, left = divmod(free, len(self.joined))  # every ``page_tokens`` steps each of them takes one
        steps = rounds * self.page_tokens
        while (left := left - self.fills[(self.now + steps) % self.page_tokens]) >= 0:
            steps += 1
        return steps

    def passed(self, steps: int, first_s: float) -> None:
        """``steps`` steps were computed, the first by ``first_s``."""
        self.now += steps
        self.context += steps * len(self.joined)
        for sequence in self.fresh:
            sequence.first_token_s = first_s
        self.fresh.clear()

    def done(self) -> list[Sequence]:
        """Those that have all the tokens that they asked for, by rank, once: they are to leave now."""
        found = []
        while self.ends and self.ends[0][0] <= self.now:
            found.append(heappop(self.ends)[1:])
        return [sequence for _, sequence in sorted(found)]

    def _end(self, sequence: Sequence) -> int:
        return self.joined[sequence] + sequence.full_at - sequence.known

    def _fills_at(self, sequence: Sequence) -> int:
        return (self.now + len(sequence.pages) * self.page_tokens - sequence.computed) % self.page_tokens


class FastForward(Scheduler):
    """A scheduler that can also be told of many steps at once. Everything ends as if it had been told of each."""

    def __init__(
        self, pool: PagePool, *, step_tokens: int, max_running: int, max_waiting: int, mixed_tokens: int | None = None
    ) -> None:
        super().__init__(
            pool, step_tokens=step_tokens, max_running=max_running, max_waiting=max_waiting, mixed_tokens=mixed_tokens
        )
        self._batch = _Batch(pool.page_tokens)

    def decode_run(self, now_s: float) -> DecodeRun | None:
        """Begins the next step if that, and perhaps more, is a plain decode of one fixed batch; None if it is not.

        The run ends before a sequence would pass its ``max_tokens`` or the free pages would run out. It holds until
        something is added, started or released. Like ``schedule`` it takes the pages of its first step.
        """
        batch = self._batch
        self._seat_ready()
        if self._join() or not batch.ends or self._admits():
            return None
        steps = batch.steps(self.pool.free)
        if steps <= 0:
            return None
        self._begin(now_s)
        return DecodeRun(len(batch.joined), batch.context, steps)

    def skip(self, steps: int, first_s: float, *, goes_on: bool) -> list[str]:
        """``steps`` steps of the current :meth:`decode_run` were computed, the first by ``first_s``.

        ``goes_on`` says that the run's next step has begun. Returns the sequences that reached their ``max_tokens``,
        which are to be released.
        """
        self._pay(steps + goes_on)
        self._batch.passed(steps, first_s)
        return [sequence.job.request_id for sequence in self._batch.done()]

    def mixed(self, now_s: float) -> MixedStep:
        """The next step as :meth:`schedule` has it, its decodes as sums where none of them loses its pages."""
        batch = self._batch
        self._seat_ready()
        prompts = self._join()
        if any(s.decodes for s in prompts) or batch.wanted(batch.now + 1) > self.pool.free or self._outranked():
            self._disband()
            return MixedStep(0, 0, self.schedule(now_s))
        self._begin(now_s)
        decodes = len(batch.joined)
        budget = self.step_tokens - decodes
        chosen = self._prefills(min(budget, self.mixed_tokens) if decodes else budget)
        for sequence, _ in chosen:
            if sequence.scheduled_s is None:
                sequence.scheduled_s = now_s
        return MixedStep(decodes, batch.context, tuple([sequence.slice(count) for sequence, count in chosen]))

    def give(self, now_s: float) -> list[str]:
        """Each decode of the current :meth:`mixed` step that is no slice has its next token; as :meth:`skip` of one."""
        return self.skip(1, now_s, goes_on=False)

    # ---- what looks at sequences must find them as they are

    def full(self, request_id: str) -> bool:
        """Whether the sequence has all the tokens that it asked for."""
        sequence = self._get(request_id)
        self._tell(sequence)
        return sequence.known >= sequence.full_at

    def release(self, request_id: str) -> bool:
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence in self._batch.joined:
            self._batch.leave(sequence)
        return super().release(request_id)

    def outputs(self, request_id: str) -> int:
        self._tell(self._get(request_id))
        return super().outputs(request_id)

    def timing(self, request_id: str) -> Timing:
        self._tell(self._get(request_id))
        return super().timing(request_id)

    @property
    def waiting_tokens(self) -> int:
        return sum([s.known - (s.computed or s.found) for s in (*self._waiting, *self._apart()) if not s.decodes])

    def check_integrity(self) -> None:
        for sequence in self._batch.joined:
            self._tell(sequence)
        super().check_integrity()

    def _victims(self, job: Job, enough: Callable[[list[Sequence]], bool]) -> list[Sequence] | None:
        for sequence in self._running:
            if sequence.job.priority < job.priority:
                self._tell(sequence)
        return super()._victims(job, enough)

    def _preempt(self, victims: list[Sequence]) -> None:
        for sequence in victims:
            if sequence in self._batch.joined:
                self._batch.leave(sequence)
        super()._preempt(victims)

    def _tell(self, sequence: Sequence) -> None:
        if sequence in self._batch.joined:
            self._batch.tell(sequence)

    # ---- the batch

    def _apart(self) -> list[Sequence]:
        """Running sequences that are not in the batch."""
        joined = self._batch.joined
        if len(self._running) == len(joined):
            return []
        return [sequence for sequence in self._running if sequence not in joined]

    def _begun(self) -> list[Sequence]:
        return [sequence for sequence in reversed(self._apart()) if not sequence.decodes]

    def _join(self) -> list[Sequence]:
        """Takes running decodes into the batch; returns who else runs.

        One with a whole page to spare, as it may come back from preemption, joins after its next step.
        """
        others = []
        for sequence in self._apart():
            spare = len(sequence.pages) * self.pool.page_tokens - sequence.computed
            if sequence.decodes and spare < self.pool.page_tokens:
                self._batch.join(sequence)
            else:
                others.append(sequence)
        return others

    def _disband(self) -> None:
        for sequence in list(self._batch.joined):
            self._batch.leave(sequence)

    def _begin(self, now_s: float) -> None:
        """The batch takes part in the step that begins now."""
        if self._batch.joined:
            self._pay(1)
        for sequence in self._batch.fresh:
            if sequence.scheduled_s is None:
                sequence.scheduled_s = now_s

    def _pay(self, steps: int) -> None:
        """Takes the pages of the next ``steps`` steps."""
        batch = self._batch
        if (until := batch.now + steps) > batch.paid:
            if wanted := batch.wanted(until):
                batch.pages += self.pool.take(wanted)
            batch.paid = until

    def _admits(self) -> bool:
        """Whether a waiting sequence could enter the next step, were all running ones decodes."""
        return bool(self._waiting) and (self._enters(self._waiting[0]) or bool(self._outranked()))
