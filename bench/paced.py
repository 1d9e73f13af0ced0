"""A local cluster whose decode workers make their tokens up at a fixed rate; everything but computing them is real.

Run by ``deploy.local.up(..., supervisor="bench.paced")`` in place of ``deploy.supervisor``. Each token's id says when
it was due (``bench.due``). A request's seed is its rate, in tokens per 1,000 s. Its priority says when its tokens are
due: 0, at its own phase; above 0, together with everybody else's, as an engine's step yields them.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from dataclasses import dataclass, fields
from typing import Any

import deploy.app
from baton.blocks import BlockJournal
from baton.layout import KVLayout
from baton.request import FinishReason, TokenEvent, Work
from bench.due import token_due
from decode_worker import worker
from decode_worker.worker import DecodeWorker
from deploy import supervisor
from deploy.app import DecodeReplica
from engine.engine import EngineLoad
from engine.sequence import Timing

LONGEST_SLEEP_S = 0.005  # so that calls to the engine wait no longer
REMEMBERED = 4096


@dataclass(slots=True)
class _Stream:
    work: Work
    gap_s: float
    due_s: float
    index: int = 0


class PacedEngine:
    """What a decode worker asks of an engine, without a model."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout, self.threads, self.cache = layout, 1, None
        self.blocks = BlockJournal()
        self.preemptions, self.blocked, self.unchecked = 0, False, False
        self._streams: dict[str, _Stream] = {}
        self._timings: deque[tuple[str, Timing]] = deque(maxlen=REMEMBERED)

    @property
    def has_work(self) -> bool:
        return bool(self._streams)

    def add(self, work: Work) -> None:
        now_s = time.monotonic()
        gap_s = 1e3 / work.sampling.seed
        due_s = now_s if work.priority <= 0 else math.ceil(now_s / gap_s) * gap_s
        self._streams[work.request_id] = _Stream(work, gap_s, due_s)
        self._timings.append((work.request_id, Timing(now_s, now_s, now_s)))

    def release(self, request_id: str) -> bool:
        return self._streams.pop(request_id, None) is not None

    def timing(self, request_id: str) -> Timing:
        return next(timing for known, timing in reversed(self._timings) if known == request_id)

    def load(self) -> EngineLoad:
        zeros: dict[str, Any] = dict.fromkeys((field.name for field in fields(EngineLoad)), 0)
        return EngineLoad(**zeros | {"running": len(self._streams), "pages_total": 1 << 20})

    def step(self) -> list[TokenEvent]:
        next_s = min(stream.due_s for stream in self._streams.values())
        time.sleep(min(max(0.0, next_s - time.monotonic()), LONGEST_SLEEP_S))
        now_s = time.monotonic()
        return [self._emit(stream) for stream in list(self._streams.values()) if stream.due_s <= now_s]

    def _emit(self, stream: _Stream) -> TokenEvent:
        work, token = stream.work, token_due(stream.due_s)
        event = TokenEvent(work.request_id, stream.index, token)
        stream.index, stream.due_s = stream.index + 1, stream.due_s + stream.gap_s
        if stream.index == work.sampling.max_tokens:
            del self._streams[work.request_id]
            return TokenEvent(work.request_id, event.index, token, finish=FinishReason.LENGTH)
        return event

    def check_integrity(self) -> None:
        """There are no pages."""

    def watch(self, on_failure: Any) -> None:
        """There are no ranks."""

    def close(self) -> None:
        """There are no ranks."""


class PacedWorker(DecodeWorker):
    """The decode worker over a paced engine."""

    def __init__(self, model: Any, config: Any, **identity: Any) -> None:
        setattr(worker, "build_engine", lambda *_, **__: PacedEngine(model.layout))  # noqa: B010 - not exported there
        super().__init__(model, config, **identity)


class PacedReplica(DecodeReplica):
    _worker_class = PacedWorker


if __name__ == "__main__":
    deploy.app.DecodeReplica = PacedReplica  # type: ignore[misc]
    sys.exit(supervisor.main())
