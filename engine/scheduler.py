"""Which tokens are computed in the next step: iteration-level batching (Orca, OSDI'22) with chunked prefill
(Sarathi-Serve, OSDI'24) over paged KV (vLLM, SOSP'23). Pure: token counts and the time in, plans out.

    add ────► WAITING ──schedule──► RUNNING ──release──► gone
                 ▲                   │   │
                 └──── preempted ────┘   └─ prefill_only, first token out ──► HELD ──release──► gone
    reserve ► RESERVED ──start──► READY ──schedule──► RUNNING

A step is filled with decodes first, then with prefills, begun or new, in the order of larger priority, then age. A
sequence enters with the pages of everything it must compute, so only decodes can run out of pages; then the running
sequence of lowest priority and latest arrival loses its pages and is computed again later. Between two steps a sequence
that waits takes the place and the pages of running ones whose priority is lower; equals never do that to each other. A
``prefill_only`` sequence never loses its pages: others may be reading them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial

from baton.errors import InvalidRequest, NotFound, Overloaded
from engine.holdings import Holdings
from engine.pages import PagePool
from engine.prefix import Key
from engine.sequence import Job, Phase, Sequence, Slice, Timing, insert

RETRY_AFTER_MS = 100  # a few decode steps: pages come free at that pace


class Scheduler:
    """Owns the sequences and their pages. One thread.

    ``mixed_tokens`` bounds the prompt tokens of a step that also decodes (None: only ``step_tokens`` does). It may be
    changed between steps, and be 0 for some. Smaller keeps the gap between two tokens of a stream near that of a step
    without prompts; larger gets prompts done in fewer steps, each of which costs the fixed part of a step again.
    """

    def __init__(
        self, pool: PagePool, *, step_tokens: int, max_running: int, max_waiting: int, mixed_tokens: int | None = None
    ) -> None:
        if min(step_tokens, max_running, max_waiting) < 1 or (mixed_tokens is not None and mixed_tokens < 1):
            raise ValueError("step_tokens, max_running, max_waiting and mixed_tokens must be at least 1")
        self.pool = pool
        self.step_tokens = step_tokens
        self.mixed_tokens = mixed_tokens if mixed_tokens is not None else step_tokens
        self.max_running = min(max_running, step_tokens)  # every running sequence gets at least one token a step
        self.max_waiting = max_waiting
        self.preemptions = 0
        self.holdings = Holdings(pool)
        self._arrivals = 0
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # sorted by rank
        self._ready: list[Sequence] = []  # sorted by rank
        self._running: list[Sequence] = []  # sorted by rank

    def add(self, job: Job, now_s: float) -> None:
        """Queues ``job``. Raises InvalidRequest when it can never fit, Overloaded when too many wait."""
        self._check_fits(job)
        if len(self._waiting) >= self.max_waiting:
            raise Overloaded(f"{len(self._waiting)} sequences are waiting already", retry_after_ms=RETRY_AFTER_MS)
        sequence = self._enter(job, now_s, Phase.WAITING)
        sequence.found = self.holdings.found(sequence)
        insert(self._waiting, sequence)

    def reserve(self, job: Job, now_s: float) -> tuple[int, ...]:
        """Takes the pages of ``job``'s prompt now, for KV that comes from elsewhere. Raises :class:`Overloaded`.

        Pages that preempted sequences wait for are not given away, lest a stream of reservations starve them, unless
        their priority is lower; nor are those of running sequences.
        """
        self._check_fits(job)
        need = self.pool.pages_for(job.prompt_tokens)
        preempted = (s for s in self._waiting if s.known > s.job.prompt_tokens and s.job.priority >= job.priority)
        room = self.pool.free - sum(self.pool.pages_for(s.known) for s in preempted)
        if need > room:
            victims = self._victims(job, lambda them: need <= room + len(self.pool.freed_by(v.pages for v in them)))
            if victims is None:
                raise Overloaded(
                    f"{need} pages wanted, {max(0, room)} of {self.pool.total} free", retry_after_ms=RETRY_AFTER_MS
                )
            self._preempt(victims)
        sequence = self._enter(job, now_s, Phase.RESERVED)
        sequence.pages = self.pool.take(need)
        return tuple(sequence.pages)

    def start(self, request_id: str, *, exact: bool = True) -> None:
        """The reserved pages now hold the whole prompt's KV and one output token is known: the sequence may decode.

        exact: the KV is what would have been computed here. KV that a lossy codec changed must not serve others.
        """
        sequence = self._get(request_id)
        if sequence.phase is not Phase.RESERVED:
            raise InvalidRequest("request_id", f"{request_id} is not reserved")
        sequence.computed = sequence.job.prompt_tokens
        sequence.known = sequence.job.prompt_tokens + 1
        sequence.publishes = exact
        self.holdings.publish(sequence)
        sequence.phase = Phase.READY
        insert(self._ready, sequence)

    def identify(self, request_id: str, key: Key) -> None:
        """Names the next full page of the sequence's known tokens; as soon as its KV is there it serves others."""
        self._get(request_id).keys.append(key)

    def schedule(self, now_s: float) -> tuple[Slice, ...]:
        """The next step, decodes first. Empty when nothing can run: then only a release or an add changes that."""
        chosen = self._choose(now_s)
        slices = (sequence.slice(count) for sequence, count in chosen)
        # One that comes back from preemption may find all but its newest token in the cache: a decode, found late.
        return tuple(sorted(slices, key=lambda part: not part.decode))

    def _choose(self, now_s: float) -> list[tuple[Sequence, int]]:
        """Sequences of the next step, and how many tokens of each."""
        self._seat_ready()
        self._preempt(self._outranked())
        while not (chosen := self._decodes()) and self._ready and len(self._running) < self.max_running:
            self._seat_ready()  # the last one that ran has just lost its pages, and with them its place
        budget = self.step_tokens - len(chosen)
        chosen += self._prefills(min(budget, self.mixed_tokens) if chosen else budget)
        for sequence, _ in chosen:
            if sequence.scheduled_s is None:
                sequence.scheduled_s = now_s
        return chosen

    def advance(self, step: tuple[Slice, ...], now_s: float) -> None:
        """``step`` was computed: its KV is in the pages, and each slice that samples has one more known token."""
        for part in step:
            sequence = self._sequences[part.request_id]
            sequence.computed += part.count
            if sequence.keys:
                self.holdings.publish(sequence)
            if not part.samples:
                continue
            sequence.known += 1
            if sequence.first_token_s is None:
                sequence.first_token_s = now_s
            if sequence.job.prefill_only:
                sequence.phase = Phase.HELD
                self._running.remove(sequence)

    def release(self, request_id: str) -> bool:
        """Forgets the sequence and gives its pages back, whatever its phase. False when there is none (any more)."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        if sequence.phase is Phase.RUNNING:
            self._running.remove(sequence)
        elif sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
        elif sequence.phase is Phase.READY:
            self._ready.remove(sequence)
        self.holdings.leave(sequence)
        return True

    def distrust(self) -> None:
        """Some KV is broken and nobody knows since when: what is in the pages now serves no sequence but its own."""
        self.holdings.distrust(self._sequences.values())

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
        """Tokens known but neither computed nor found in the cache, over all sequences that want to be computed."""
        return sum([s.known - (s.computed or s.found) for s in (*self._waiting, *self._running) if not s.decodes])

    @property
    def running(self) -> int:
        return len(self._running)

    def check_integrity(self) -> None:
        """Raises :class:`engine.pages.PageIntegrityError` unless sequences and prefix cache explain every page."""
        self.holdings.check_integrity(self._sequences.values())

    def _check_fits(self, job: Job) -> None:
        if job.request_id in self._sequences:
            raise InvalidRequest("request_id", f"{job.request_id} is already here")
        if job.prompt_tokens < 1 or job.max_tokens < 1:
            raise InvalidRequest("prompt", "a sequence needs at least one prompt token and one output token")
        tokens = job.prompt_tokens + (0 if job.prefill_only else job.max_tokens - 1)  # the last token needs no KV
        if self.pool.pages_for(tokens) > self.pool.total:
            capacity = self.pool.total * self.pool.page_tokens
            raise InvalidRequest("prompt", f"{tokens} tokens can never fit this worker's KV cache of {capacity} tokens")

    def _enter(self, job: Job, now_s: float, phase: Phase) -> Sequence:
        full_at = job.prompt_tokens + job.max_tokens
        sequence = Sequence(job, self._arrivals, now_s, phase, job.prompt_tokens, full_at, list(job.keys))
        self._arrivals += 1
        self._sequences[job.request_id] = sequence
        return sequence

    def _get(self, request_id: str) -> Sequence:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            raise NotFound("request_id", f"no sequence {request_id} here")
        return sequence

    # ---- who runs

    def _seat_ready(self) -> None:
        while self._ready:
            if len(self._running) >= self.max_running:
                victims = self._victims(self._ready[0].job, lambda them: True)
                if victims is None:
                    return
                self._preempt(victims)
            self._run(self._ready.pop(0))

    def _outranked(self) -> list[Sequence]:
        """Running sequences that must make way for the first of the waiting ones."""
        if not (self._waiting and self._running):
            return []
        head = self._waiting[0]
        if head.job.priority <= self._running[-1].job.priority or self._enters(head):
            return []
        return self._victims(head.job, partial(self._enters, head)) or []

    def _victims(self, job: Job, enough: Callable[[list[Sequence]], bool]) -> list[Sequence] | None:
        """The fewest running sequences of lower priority than ``job``, lowest rank first, that are ``enough``."""
        lower = [s for s in reversed(self._running) if s.job.priority < job.priority and s.preemptible]
        if not lower or not enough(lower):
            return None
        fewest = bisect_left(range(1, len(lower)), True, key=lambda count: enough(lower[:count])) + 1
        return lower[:fewest]

    def _enters(self, sequence: Sequence, victims: list[Sequence] | None = None) -> bool:
        """Whether there is a place, and pages, were ``victims`` gone."""
        gone = victims or []
        return len(self._running) - len(gone) < self.max_running and self.holdings.fits(sequence, gone)

    def _run(self, sequence: Sequence) -> None:
        sequence.phase = Phase.RUNNING
        insert(self._running, sequence)

    def _preempt(self, victims: list[Sequence]) -> None:
        for victim in victims:
            self.preemptions += 1
            self._running.remove(victim)
            self.holdings.leave(victim)
            victim.phase = Phase.WAITING
            insert(self._waiting, victim)

    # ---- what a step computes

    def _decodes(self) -> list[tuple[Sequence, int]]:
        """One token for every decode, best rank first, so that who is preempted was never chosen before."""
        chosen, page_tokens = [], self.pool.page_tokens
        for sequence in [s for s in self._running if s.decodes]:
            if sequence.phase is not Phase.RUNNING:
                continue
            if len(sequence.pages) * page_tokens > sequence.computed or self._grow(sequence):
                chosen.append((sequence, 1))
        return chosen

    def _grow(self, sequence: Sequence) -> bool:
        """Gives a decode another page, from others if it must; False when it was itself preempted."""
        while self.pool.free == 0:
            victim = next(s for s in reversed(self._running) if s.preemptible)  # at worst ``sequence`` itself
            self._preempt([victim])
            if victim is sequence:
                return False
        sequence.pages += self.pool.take(1)
        return True

    def _begun(self) -> list[Sequence]:
        """Running sequences with prompt left to compute, lowest rank first."""
        return [s for s in reversed(self._running) if not s.decodes]

    def _prefills(self, budget: int) -> list[tuple[Sequence, int]]:
        """Begun and new sequences by rank while tokens, places and pages last. No new one overtakes the first.

        One that was preempted may find all but its newest token in the cache. It is a decode then: the prompts
        beside it get no more than beside any other, and where they have more already, it waits for the next step.
        """
        chosen, prompts = [], 0
        begun = self._begun()
        while budget > 0:
            head = self._waiting[0] if self._waiting and self._enters(self._waiting[0]) else None
            if begun and (head is None or begun[-1].rank < head.rank):
                sequence = begun.pop()
                self.holdings.adopt(sequence)
            elif head is not None:
                sequence = self._waiting.pop(0)
                self.holdings.enter(sequence)
                self._run(sequence)
            else:
                break
            if sequence.decodes:
                if prompts <= self.mixed_tokens:
                    chosen.append((sequence, 1))
                    budget = min(budget - 1, self.mixed_tokens - prompts)
                continue
            count = min(budget, sequence.known - sequence.computed)
            chosen.append((sequence, count))
            budget, prompts = budget - count, prompts + count
        return chosen
