"""What the scheduler is told of a sequence, what it remembers of one, and what it says about one in a step."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from enum import Enum, auto

from engine.prefix import Key


class Phase(Enum):
    WAITING = auto()
    RESERVED = auto()
    READY = auto()
    RUNNING = auto()
    HELD = auto()


@dataclass(frozen=True, slots=True)
class Job:
    """What the scheduler must know of one sequence.

    ``keys`` name the prompt's full pages for the prefix cache, from the first on; without them it is not cached.
    """

    request_id: str
    prompt_tokens: int
    max_tokens: int
    priority: int = 0
    prefill_only: bool = False
    keys: tuple[Key, ...] = ()


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
    that the slice ends at the sequence's last known token, so the next token is drawn from its last row. ``cached``
    tokens right before ``start`` came out of the prefix cache since the sequence's last slice. ``copy`` is a page whose
    content must be copied, and where to, before anything of this step is written: the copy is written, the original
    is shared.
    """

    request_id: str
    start: int
    count: int
    pages: tuple[int, ...]
    samples: bool
    decode: bool
    prefill_only: bool
    cached: int = 0
    copy: tuple[int, int] | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence under way. The first ``published`` of its ``pages`` are in the prefix cache, under ``keys``."""

    job: Job
    arrival: int
    added_s: float
    phase: Phase
    known: int  # prompt and output tokens
    full_at: int  # tokens at which it has all it asked for
    keys: list[Key]  # of the full pages of its known tokens
    computed: int = 0  # tokens whose KV is in the pages
    found: int = 0  # tokens that were in the cache when it came
    pages: list[int] = field(default_factory=list)
    published: int = 0
    publishes: bool = True  # whether more of its pages may enter the cache
    cached: int = 0  # tokens from the cache that no slice has told of
    copy: tuple[int, int] | None = None  # a copy that no slice has told of
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
        """Others may be reading the pages of a ``prefill_only`` sequence."""
        return not self.job.prefill_only

    def slice(self, count: int) -> Slice:
        """Its next ``count`` tokens."""
        part = Slice(
            self.job.request_id,
            self.computed,
            count,
            tuple(self.pages),
            samples=self.computed + count == self.known,
            decode=self.decodes,
            prefill_only=self.job.prefill_only,
            cached=self.cached,
            copy=self.copy,
        )
        self.cached, self.copy = 0, None
        return part


def insert(queue: list[Sequence], sequence: Sequence) -> None:
    """Keeps ``queue`` sorted by rank. Mostly the newest comes last."""
    if not queue or queue[-1].rank < sequence.rank:
        queue.append(sequence)
    else:
        bisect.insort(queue, sequence, key=lambda s: s.rank)
