"""The engine: ``step`` schedules, runs the model once, samples, and returns every new token. One thread owns it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import torch

from baton.blocks import BlockJournal
from baton.errors import InvalidRequest, NotFound, ProtocolError
from baton.request import Sampling, TokenEvent, Work
from engine.active import Active
from engine.attention import Span
from engine.cache import KVCache, PagedKV
from engine.model import Model
from engine.pace import Pace
from engine.pages import PagePool
from engine.prefix import Key, PageName
from engine.ranks import Ranks
from engine.runner import Runner, Step
from engine.sampler import NO_TOKEN, Choice, Row, sample
from engine.scheduler import Scheduler
from engine.sequence import Job, Slice, Timing
from engine.speed import PromptSpeed, StepSpeed

T = TypeVar("T")
log = logging.getLogger(__name__)

BROKEN = "broken"  # ``finish`` of an event without a token: see :data:`engine.sampler.NO_TOKEN`
REMEMBERED_TIMINGS = 1024  # of released sequences; their owner asks right after the last token


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``[start, start + count)`` of a sequence, computed in this step or found in the prefix cache before it.

    ``pages`` is the sequence's whole block table, as :meth:`engine.cache.KVCache.gather` takes it.
    """

    request_id: str
    start: int
    count: int
    pages: tuple[int, ...]


class LayerObserver(Protocol):
    """Told where new KV lies while the step still runs, so that it can leave before the next layer is computed."""

    def layer_written(self, layer: int, chunks: Sequence[Chunk]) -> None:
        """Called on the engine thread, right after ``layer``'s K and V of this step's prefill_only chunks are in their
        pages. The chunks of a sequence join up to its whole prompt. Must return quickly. The pages stay as they are
        until the sequence is released."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    waiting: int  # sequences that are not in the running batch
    waiting_tokens: int  # known tokens not yet computed, decodes aside
    running: int
    pages_used: int  # by sequences; pages that only the prefix cache holds are free
    pages_total: int
    pages_high_water: int
    pages_cached: int  # in the prefix cache, used or free
    entered_tokens: int  # so far, of sequences that got their pages (again after each preemption)
    hit_tokens: int  # of these, not computed because their KV was in the prefix cache
    prompt_token_s: float  # seconds per prompt token lately; 0 while none was computed
    step_s: float  # seconds of a step of decodes lately, apart from what its sequences add; 0 while none was computed
    sequence_s: float  # seconds that each of them adds


class Engine:
    """Continuous batching of one model over one paged KV cache. Every method runs on the thread that calls ``step``."""

    def __init__(
        self,
        model: Model,
        *,
        page_tokens: int,
        pages: int,
        step_tokens: int,
        max_running: int,
        max_waiting: int,
        mixed_tokens: int = 0,
        gap_s: float = 0.0,
        prefix_cache: bool = True,
        observer: LayerObserver | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """``ranks`` of a tensor-parallel model hold the cache of ``pages`` pages, and are closed with the engine.

        mixed_tokens: most prompt tokens of a step that also decodes; 0 leaves it, with ``gap_s``, to
        :class:`engine.pace.Pace`.
        """
        self.layout, self.threads = model.layout, model.threads
        self.cache: PagedKV
        if ranks is None:
            own = self.cache = KVCache(model.layout, pages=pages, page_tokens=page_tokens, device=model.device)
        else:
            self.cache, own = ranks.cache, ranks.cache.own
        self._model, self._runner, self._ranks = model, Runner(model, own), ranks
        self._observer = observer
        self._pool = PagePool(pages, page_tokens)
        self._scheduler = Scheduler(
            self._pool,
            step_tokens=step_tokens,
            max_running=max_running,
            max_waiting=max_waiting,
            mixed_tokens=mixed_tokens or None,
        )
        self._pace = None if mixed_tokens else Pace(gap_s)
        self._speed, self._steps = PromptSpeed(), StepSpeed()
        self._salt = model.layout.fingerprint.encode() if prefix_cache else None
        self.blocks = BlockJournal()  # of the prefix cache
        self._scheduler.holdings.cache.on_change = self._note
        self._scheduler.holdings.cache.on_clear = self.blocks.clear
        self._active: dict[str, Active] = {}
        self._past_timings: dict[str, Timing] = {}
        self._checked = self._pool.changes
        self.blocked = False  # the last step found work but could run none: it waits for pages that others hold

    def warm_up(self, largest: int) -> None:
        """Before the first step, on CUDA: compiles every rank's kernels, and captures decodes of up to ``largest``.

        0 captures none. Nor do several ranks: their sums in captured graphs have not been tried on GPUs yet.
        """
        for step in self._runner.warm_up_steps():
            logits = self._run(step)
        if largest and self._ranks is None:
            self._runner.capture(largest)
        sample(logits, [Row(Sampling(), 0)])

    def add(self, work: Work, *, prefill_only: bool = False) -> None:
        """Queues ``work``. A prefill_only sequence yields its first token and then holds its pages until released.

        Raises :class:`baton.errors.Overloaded` when too many wait and :class:`baton.errors.InvalidRequest` when it can
        never fit.
        """
        self._enter(work, prefill_only, self._scheduler.add)

    def reserve(self, work: Work) -> tuple[int, ...]:
        """Pages for the prompt, taken now, whose KV someone else will write. Raises as :meth:`add` does."""
        return self._enter(work, False, self._scheduler.reserve)

    def start(self, request_id: str, first: TokenEvent, *, exact: bool = True) -> None:
        """The reserved pages hold the whole prompt's KV, and ``first`` was emitted elsewhere: decode from there on.

        exact: no lossy codec changed the KV. Only then may it serve other sequences from the prefix cache.
        """
        active = self._active.get(request_id)
        if active is None:
            raise NotFound("request_id", f"no sequence {request_id} here")
        if first.finish:
            self.release(request_id)
            return
        if not 0 <= first.token < self._model.spec.vocab_size:
            raise ProtocolError(f"first token {first.token} is not one of {self._model.spec.vocab_size}")
        self._scheduler.start(request_id, exact=exact)
        self._append(active, first.token)

    def release(self, request_id: str) -> bool:
        """Frees everything the sequence holds, whatever its state. False when there is none (any more)."""
        active = self._active.pop(request_id, None)
        if active is None:
            return False
        self._past_timings[request_id] = self._scheduler.timing(request_id)
        if len(self._past_timings) > REMEMBERED_TIMINGS:
            del self._past_timings[next(iter(self._past_timings))]
        return self._scheduler.release(request_id)

    def step(self) -> list[TokenEvent]:
        """Computes one step and returns its new tokens. Empty also when sequences wait for pages that others hold.

        A sequence whose logits are not finite is released, and its event has :data:`BROKEN` for its ``finish``.
        """
        started_s = time.monotonic()
        if self._pace is not None:
            self._scheduler.mixed_tokens = self._pace.mixed_tokens(self._scheduler.step_tokens)
        slices = self._scheduler.schedule(started_s)
        self.blocked = not slices and self.has_work
        if not slices:
            return []
        # Longest context first: neighbours then share a padded gather.
        decodes = sorted((part for part in slices if part.decode), key=lambda part: -part.start)
        ordered = (*decodes, *(part for part in slices if not part.decode))
        sampled = [part for part in ordered if part.samples]
        logits = self._forward(ordered, len(decodes))
        choices = sample(logits, [self._row(part) for part in sampled]) if sampled else []
        ended_s = time.monotonic()
        prompt_tokens = sum(part.count for part in ordered[len(decodes) :])
        self._speed.observe(prompt_tokens, ended_s - started_s)
        self._steps.observe(len(decodes), ended_s - started_s)
        if self._pace is not None:
            self._pace.observe(len(decodes), prompt_tokens, ended_s - started_s)
        self._scheduler.advance(ordered, ended_s)
        return [self._emit(part, choice) for part, choice in zip(sampled, choices, strict=True)]

    @property
    def has_work(self) -> bool:
        """Some sequence wants to be computed; held and reserved ones do not."""
        return self._scheduler.has_work

    @property
    def preemptions(self) -> int:
        """How often a sequence lost its pages and had to be computed again."""
        return self._scheduler.preemptions

    def timing(self, request_id: str) -> Timing:
        """``time.monotonic`` seconds of a sequence that is here or was released lately; else raises NotFound."""
        past = self._past_timings.get(request_id)
        return past if past is not None and request_id not in self._active else self._scheduler.timing(request_id)

    def load(self) -> EngineLoad:
        scheduler, pool = self._scheduler, self._pool
        return EngineLoad(
            scheduler.waiting,
            scheduler.waiting_tokens,
            scheduler.running,
            pool.used,
            pool.total,
            pool.high_water,
            pages_cached=pool.kept,
            entered_tokens=scheduler.holdings.entered_tokens,
            hit_tokens=scheduler.holdings.hit_tokens,
            prompt_token_s=self._speed.token_s,
            step_s=self._steps.step_s,
            sequence_s=self._steps.sequence_s,
        )

    @property
    def unchecked(self) -> bool:
        """Some page has changed hands since the last :meth:`check_integrity`."""
        return self._pool.changes != self._checked

    def check_integrity(self) -> None:
        """Raises :class:`engine.pages.PageIntegrityError` when a page leaked, has two owners or is cached wrongly."""
        self._scheduler.check_integrity()
        self._checked = self._pool.changes

    def watch(self, on_failure: Callable[[BaseException], None]) -> None:
        """``on_failure`` is called, on another thread, when a rank dies: also while no step would notice."""
        if self._ranks is not None:
            self._ranks.watch(on_failure)

    def close(self) -> None:
        """Ends the other ranks. No step may run any more."""
        if self._ranks is not None:
            self._ranks.close()

    def _enter(self, work: Work, prefill_only: bool, enter: Callable[[Job, float], T]) -> T:
        """``enter`` takes the sequence into the scheduler, or refuses it."""
        self._validate(work, prefill_only)
        active, sampling = Active(work, self._pool.page_tokens, self._salt), work.sampling
        due = sampling.max_tokens - len(work.output)  # what the client has already is prompt to the scheduler
        job = Job(work.request_id, len(work.known), due, work.priority, prefill_only, active.keys)
        entered = enter(job, time.monotonic())
        self._past_timings.pop(work.request_id, None)
        self._active[work.request_id] = active
        return entered

    def _validate(self, work: Work, prefill_only: bool) -> None:
        if max(work.known, default=0) >= self._model.spec.vocab_size or min(work.known, default=0) < 0:
            raise InvalidRequest("prompt", f"token ids must lie in [0, {self._model.spec.vocab_size})")
        if len(work.output) >= work.sampling.max_tokens:
            raise InvalidRequest("output", f"{len(work.output)} tokens are all that were asked for")
        length = len(work.known) + 1 if prefill_only else len(work.prompt) + work.sampling.max_tokens
        if length > self._model.max_context:
            raise InvalidRequest("prompt", f"{length} tokens exceed the context of {self._model.max_context}")

    def _note(self, key: Key, held: bool) -> None:
        self.blocks.change(cast(PageName, key).blocks, held=held)

    def _append(self, active: Active, token: int) -> None:
        """A new output token; the scheduler learns the name of a page that it fills."""
        key = active.append(token)
        if key is not None:
            self._scheduler.identify(active.work.request_id, key)

    def _forward(self, ordered: Sequence[Slice], decodes: int) -> torch.Tensor:
        """Logits [slices that sample, vocab]; the step's KV is in the pages afterwards."""
        tokens: list[int] = []
        wanted = []
        for part in ordered:
            tokens += self._active[part.request_id].tokens[part.start : part.start + part.count]
            if part.samples:
                wanted.append(len(tokens) - 1)
        spans = tuple(Span(part.start, part.count, part.pages) for part in ordered)
        copies = [part.copy for part in ordered if part.copy is not None]
        step = Step(
            tuple(tokens),
            tuple(wanted),
            spans,
            decodes,
            copied=tuple(source for source, _ in copies),
            copies=tuple(target for _, target in copies),
        )
        return self._run(step, self._announcement(ordered))

    def _run(self, step: Step, layer_written: Callable[[int], None] | None = None) -> torch.Tensor:
        if self._ranks is not None:
            self._ranks.send(step)
        return self._runner.run(step, layer_written)

    def _announcement(self, ordered: Sequence[Slice]) -> Callable[[int], None] | None:
        observer = self._observer
        chunks = tuple(
            Chunk(part.request_id, part.start - part.cached, part.cached + part.count, part.pages)
            for part in ordered
            if part.prefill_only
        )
        if observer is None or not chunks:
            return None
        return lambda layer: observer.layer_written(layer, chunks)

    def _row(self, part: Slice) -> Row:
        active = self._active[part.request_id]
        return Row(active.work.sampling, active.outputs, active.counts)

    def _emit(self, part: Slice, choice: Choice) -> TokenEvent:
        active = self._active[part.request_id]
        if choice.token == NO_TOKEN:
            log.error("%s: the logits are not finite", part.request_id)
            self.release(part.request_id)
            self._scheduler.distrust()
            return TokenEvent(part.request_id, active.outputs, NO_TOKEN, finish=BROKEN)
        self._append(active, choice.token)
        finish = active.finish()
        if finish is not None and not part.prefill_only:
            self.release(part.request_id)
        return TokenEvent(
            part.request_id,
            active.outputs - 1,
            choice.token,
            choice.logprob,
            choice.top,
            finish.value if finish else "",
        )
