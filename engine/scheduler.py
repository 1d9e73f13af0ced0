"""Which tokens are computed in the next step: iteration-level batching (Orca, OSDI'22) with chunked prefill
(Sarathi-Serve, OSDI'24) over paged KV (vLLM, SOSP'23). Pure: token counts and the time in, plans out.

    add ────► WAITING ──schedule──► RUNNING ──release──► gone
                 ▲                   │   │
                 └──── preempted ────┘   └─ prefill_only, first token out ──► HELD ──release──► gone
    reserve ► RESERVED ──start──► READY ──schedule──► RUNNING

A step is filled in this order: decodes, unfinished prefills, then new sequences (larger priority first, then older).
A sequence enters with the pages of everything it must compute, so only decodes can run out of pages; then the running
sequence of lowest priority and latest arrival loses its pages and is computed again later. A ``prefill_only`` sequence
never loses its pages: others may be reading them.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from enum import Enum, auto

from baton.errors import InvalidRequest, NotFound, Overloaded
from engine.pages import PagePool

RETRY_AFTER_MS = 100  # a few decode steps: pages come free at that pace


class Phase(Enum):
    WAITING = auto()
    RESERVED = auto()
    READY = auto()
    RUNNING = auto()
    HELD = auto()


@dataclass(frozen=True, slots=True)
class Job:
    """What the scheduler must know of one sequence."""

    request_id: str
    prompt_tokens: int
    max_tokens: int
    priority: int = 0
    prefill_only: bool = False


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of the clock that the caller passes in. ``added_s`` is when the sequence was added or reserved."""

    added_s: float
    scheduled_s: float | None = None  # first time in a step
    first_token_s: float | None = None  # first token that came out of a step here

    @property
    def queue_s(self) -> float:
        """Seconds from being added to the first step; 0 before it."""
        return 0.0 if self.scheduled_s is None else self.scheduled_s - self.added_s

    @property
    def prefill_s(self) -> float:
        """Seconds from the first step to the first token that came out here; 0 before it."""
        if self.scheduled_s is None or self.first_token_s is None:
            return 0.0
        return self.first_token_s - self.scheduled_s


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens ``[start, start + count)`` of one sequence, to be computed in this step into ``pages``.

    ``pages`` is the sequence's whole block table: token ``t`` lies in ``pages[t // page_tokens]``. ``samples`` says
    that the slice ends at the sequence's last known token, so the next token is drawn from its last row.
    """

    request_id: str
    start: int
    count: int
    pages: tuple[int, ...]
    samples: bool
    decode: bool
    prefill_only: bool


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """The next ``steps`` steps give one token to each of ``contexts``'s sequences and do nothing else.

    ``contexts`` are the tokens that each sequence's query attends to in the first of them; each grows by one a step.
    """

    contexts: tuple[int, ...]
    steps: int


@dataclass(slots=True, eq=False)
class _Sequence:
    job: Job
    arrival: int
    added_s: float
    phase: Phase
    known: int  # prompt and output tokens
    full_at: int  # tokens at which it has all it asked for
    computed: int = 0  # tokens whose KV is in the pages
    pages: list[int] = field(default_factory=list)
    scheduled_s: float | None = None
    first_token_s: float | None = None

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts sequences into the order in which they are served."""
        return (-self.job.priority, self.arrival)

    @property
    def decodes(self) -> bool:
        return self.known - self.computed == 1 and self.known > self.job.prompt_tokens

    @property
    def preemptible(self) -> bool:
        return not self.job.prefill_only


class Scheduler:
    """Owns the sequences and their pages. One thread."""

    def __init__(self, pool: PagePool, *, step_tokens: int, max_running: int, max_waiting: int) -> None:
        if min(step_tokens, max_running, max_waiting) < 1:
            raise ValueError("step_tokens, max_running and max_waiting must be at least 1")
        self.pool = pool
        self.step_tokens = step_tokens
        self.max_running = min(max_running, step_tokens)  # every running sequence gets at least one token a step
        self.max_waiting = max_waiting
        self.preemptions = 0
        self._arrivals = 0
        self._sequences: dict[str, _Sequence] = {}
        self._waiting: list[_Sequence] = []  # sorted by rank
        self._ready: list[_Sequence] = []  # sorted by rank
        self._running: list[_Sequence] = []  # sorted by rank

    def add(self, job: Job, now_s: float) -> None:
        """Queues ``job``. Raises InvalidRequest when it can never fit, Overloaded when too many wait."""
        self._check_fits(job)
        if len(self._waiting) >= self.max_waiting:
            raise Overloaded(f"{len(self._waiting)} sequences are waiting already", retry_after_ms=RETRY_AFTER_MS)
        _insert(self._waiting, self._enter(job, now_s, Phase.WAITING))

    def reserve(self, job: Job, now_s: float) -> tuple[int, ...]:
        """Takes the pages of ``job``'s prompt now, for KV that comes from elsewhere. Raises :class:`Overloaded`.

        Pages that preempted sequences wait for are not given away: a stream of reservations would starve them.
        """
        self._check_fits(job)
        need = self.pool.pages_for(job.prompt_tokens)
        owed = sum(self.pool.pages_for(s.known) for s in self._waiting if s.known > s.job.prompt_tokens)
        if need > self.pool.free - owed:
            free = max(0, self.pool.free - owed)
            raise Overloaded(f"{need} pages wanted, {free} of {self.pool.total} free", retry_after_ms=RETRY_AFTER_MS)
        sequence = self._enter(job, now_s, Phase.RESERVED)
        sequence.pages = self.pool.take(need)
        return tuple(sequence.pages)

    def start(self, request_id: str) -> None:
        """The reserved pages now hold the whole prompt's KV and one output token is known: the sequence may decode."""
        sequence = self._get(request_id)
        if sequence.phase is not Phase.RESERVED:
            raise InvalidRequest("request_id", f"{request_id} is not reserved")
        sequence.computed = sequence.job.prompt_tokens
        sequence.known = sequence.job.prompt_tokens + 1
        sequence.phase = Phase.READY
        _insert(self._ready, sequence)

    def schedule(self, now_s: float) -> tuple[Slice, ...]:
        """The next step, decodes first. Empty when nothing can run: then only a release or an add changes that."""
        self._run_ready()
        chosen = self._decodes()
        budget = self.step_tokens - len(chosen)
        for sequence in self._running:
            if budget > 0 and not sequence.decodes:
                count = min(budget, sequence.known - sequence.computed)
                chosen.append((sequence, count))
                budget -= count
        chosen += self._admit(budget)
        for sequence, _ in chosen:
            if sequence.scheduled_s is None:
                sequence.scheduled_s = now_s
        return tuple(_slice(sequence, count) for sequence, count in chosen)

    def advance(self, step: tuple[Slice, ...], now_s: float) -> None:
        """``step`` was computed: its KV is in the pages, and each slice that samples has one more known token."""
        for part in step:
            sequence = self._sequences[part.request_id]
            sequence.computed += part.count
            if not part.samples:
                continue
            sequence.known += 1
            if sequence.first_token_s is None:
                sequence.first_token_s = now_s
            if sequence.job.prefill_only:
                sequence.phase = Phase.HELD
                self._running.remove(sequence)

    def decode_run(self, now_s: float) -> DecodeRun | None:
        """Begins the next step if that, and perhaps more, is a plain decode of one fixed batch; None if it is not.

        The run ends before a sequence would pass its ``max_tokens`` or the free pages would run out. It holds until
        something is added, started or released. Like ``schedule`` it takes the pages of its first step. For callers
        that need no block tables: a simulator takes a run in one :meth:`skip` and not step by step.
        """
        self._run_ready()
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

    def release(self, request_id: str) -> bool:
        """Forgets the sequence and frees its pages, whatever its phase. False when there is none (any more)."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        queues = {Phase.WAITING: self._waiting, Phase.READY: self._ready, Phase.RUNNING: self._running}
        queue = queues.get(sequence.phase)
        if queue is not None:
            queue.remove(sequence)
        self.pool.drop(sequence.pages)
        return True

    def timing(self, request_id: str) -> Timing:
        sequence = self._get(request_id)
        return Timing(sequence.added_s, sequence.scheduled_s, sequence.first_token_s)

    def outputs(self, request_id: str) -> int:
        """Output tokens of the sequence that are known."""
        sequence = self._get(request_id)
        return sequence.known - sequence.job.prompt_tokens

    @property
    def has_work(self) -> bool:
        """Some sequence wants to be computed (it may still have to wait for pages)."""
        return bool(self._running or self._ready or self._waiting)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._ready)

    @property
    def waiting_tokens(self) -> int:
        """Tokens that are known but not computed, over all sequences that want to be."""
        return sum(s.known - s.computed for queue in (self._waiting, self._running) for s in queue if not s.decodes)

    @property
    def running(self) -> int:
        return len(self._running)

    def check_integrity(self) -> None:
        """Raises :class:`engine.pages.PageIntegrityError` unless all pages are owned as the sequences say."""
        self.pool.check_integrity(sequence.pages for sequence in self._sequences.values())

    def _check_fits(self, job: Job) -> None:
        if job.request_id in self._sequences:
            raise InvalidRequest("request_id", f"{job.request_id} is already here")
        if job.prompt_tokens < 1 or job.max_tokens < 1:
            raise InvalidRequest("prompt", "a sequence needs at least one prompt token and one output token")
        tokens = job.prompt_tokens + (0 if job.prefill_only else job.max_tokens - 1)  # the last token needs no KV
        if self.pool.pages_for(tokens) > self.pool.total:
            capacity = self.pool.total * self.pool.page_tokens
            raise InvalidRequest("prompt", f"{tokens} tokens can never fit this worker's KV cache of {capacity} tokens")

    def _enter(self, job: Job, now_s: float, phase: Phase) -> _Sequence:
        sequence = _Sequence(
            job, self._arrivals, now_s, phase, known=job.prompt_tokens, full_at=job.prompt_tokens + job.max_tokens
        )
        self._arrivals += 1
        self._sequences[job.request_id] = sequence
        return sequence

    def _get(self, request_id: str) -> _Sequence:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            raise NotFound("request_id", f"no sequence {request_id} here")
        return sequence

    def _run_ready(self) -> None:
        while self._ready and len(self._running) < self.max_running:
            self._run(self._ready.pop(0))

    def _admits(self) -> bool:
        """Whether a waiting sequence could enter the next step, were all running ones decodes."""
        running = len(self._running)
        if not self._waiting or running >= self.max_running or running >= self.step_tokens:
            return False
        return self.pool.pages_for(self._waiting[0].known) <= self.pool.free

    def _run(self, sequence: _Sequence) -> None:
        sequence.phase = Phase.RUNNING
        _insert(self._running, sequence)

    def _decodes(self) -> list[tuple[_Sequence, int]]:
        """One token for every decode, best rank first, so that who is preempted was never chosen before."""
        chosen = []
        for sequence in [s for s in self._running if s.decodes]:
            if sequence.phase is Phase.RUNNING and self._grow(sequence):
                chosen.append((sequence, 1))
        return chosen

    def _grow(self, sequence: _Sequence) -> bool:
        """Gives a decode the page of its next token, from others if it must; False when it was itself preempted."""
        if len(sequence.pages) * self.pool.page_tokens > sequence.computed:
            return True
        while self.pool.free == 0:
            victim = next(s for s in reversed(self._running) if s.preemptible)  # at worst ``sequence`` itself
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages += self.pool.take(1)
        return True

    def _preempt(self, victim: _Sequence) -> None:
        self.preemptions += 1
        self._running.remove(victim)
        self.pool.drop(victim.pages)
        victim.pages, victim.computed, victim.phase = [], 0, Phase.WAITING
        _insert(self._waiting, victim)

    def _admit(self, budget: int) -> list[tuple[_Sequence, int]]:
        """New sequences while tokens, places and pages last. None overtakes the first that does not fit."""
        chosen = []
        while budget > 0 and self._waiting and len(self._running) < self.max_running:
            sequence = self._waiting[0]
            need = self.pool.pages_for(sequence.known)
            if need > self.pool.free:
                break
            self._waiting.pop(0)
            sequence.pages = self.pool.take(need)
            self._run(sequence)
            count = min(budget, sequence.known)
            chosen.append((sequence, count))
            budget -= count
        return chosen


def _insert(queue: list[_Sequence], sequence: _Sequence) -> None:
    bisect.insort(queue, sequence, key=lambda s: s.rank)


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


def _slice(sequence: _Sequence, count: int) -> Slice:
    return Slice(
        sequence.job.request_id,
        sequence.computed,
        count,
        tuple(sequence.pages),
        samples=sequence.computed + count == sequence.known,
        decode=sequence.decodes,
        prefill_only=sequence.job.prefill_only,
    )
