"""What the engine's prefix cache hits on the Mooncake traces when nothing is ever evicted."""

from __future__ import annotations

from pathlib import Path

from engine.pages import PagePool
from engine.scheduler import Scheduler
from engine.sequence import Job
from placement import traces
from placement.workload import Workload

TRACES = Path(__file__).parents[2] / "shared" / "data" / "traces"
NAMES = ("conversation", "synthetic")


def hit_rates() -> dict[str, dict[str, float]]:
    """For each trace its requests, its prompts' blocks, how many of them were hit, and their share."""
    return {name: _replay(traces.load(TRACES / f"mooncake_{name}.jsonl")) for name in NAMES}


def _replay(workload: Workload) -> dict[str, float]:
    """Every request alone, in order, through the scheduler: pages of one block, and enough of them for all."""
    page_tokens, blocks = workload.block_tokens, sum(len(arrival.blocks) for arrival in workload.arrivals)
    scheduler = Scheduler(PagePool(blocks, page_tokens), step_tokens=1 << 30, max_running=1, max_waiting=1)
    hits = 0
    for index, arrival in enumerate(workload.arrivals):
        tokens = len(arrival.blocks) * page_tokens  # the last block is counted as a full one, as in the published rates
        scheduler.add(Job(str(index), tokens, 1, prefill_only=True, keys=arrival.blocks), 0.0)
        step = scheduler.schedule(0.0)
        hits += scheduler.pool.pages_for(step[0].start)  # all but one token when all are cached
        scheduler.advance(step, 0.0)
        scheduler.release(str(index))
    scheduler.check_integrity()
    return {"requests": len(workload.arrivals), "blocks": blocks, "hit_blocks": hits, "hit_rate": hits / blocks}
