"""Requests at the entry of a router whose workers are far away: turns, refusals, the ends of waiting."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace

import pytest

from baton.api_keys import ANYBODY, Caller, TenantLimits
from baton.config_admission import AdmissionConfig, ClassConfig
from baton.errors import DeadlineExceeded, Overloaded
from baton.messages import Load
from baton.request import Sampling
from router.entry import Entry
from router.peers import Role
from router.policy import WorkerView
from router.validate import ParsedRequest

IDLE = Load(0, 0, 0, 0, 100, 0, 0, 0, 0)


class Named:
    """A worker as the entry sees it: what it said last."""

    def __init__(self, load: Load) -> None:
        self.load = load

    def view(self) -> WorkerView:
        return WorkerView("w", self.load)


class Workers:
    def __init__(self, prefill: Load = IDLE, decode: Load = IDLE) -> None:
        self.prefill, self.decode = Named(prefill), Named(decode)

    def of(self, role: Role) -> list[Named]:
        return [self.prefill if role == "prefill" else self.decode]


def request(*, ttft_ms: float = 0.0, budget_s: float = 5.0, tokens: int = 100, outputs: int = 1) -> ParsedRequest:
    slo = ClassConfig(ttft_ms=ttft_ms)
    sampling = Sampling(max_tokens=50)
    return ParsedRequest("r", (1,) * tokens, sampling, (), 0, budget_s, "raw", outputs=outputs, slo_class="c", slo=slo)


def entry(workers: Workers | None = None, **config: float) -> Entry:
    return Entry(AdmissionConfig(**config), workers or Workers())  # type: ignore[arg-type]


async def run(door: Entry, parsed: ParsedRequest, hold: asyncio.Event, caller: Caller = ANYBODY) -> None:
    door.charge(caller)
    async with door.turn(parsed, caller, arrived_s=time.monotonic(), uncached_tokens=len(parsed.prompt)) as turn:
        door.came(turn, 1)
        await hold.wait()


async def settle() -> None:
    await asyncio.sleep(0.03)


BUSY = replace(IDLE, waiting_tokens=1000, prompt_token_s=0.001)


async def test_nobody_waits_where_nothing_is_known() -> None:
    door, hold = entry(), asyncio.Event()
    running = [asyncio.create_task(run(door, request(ttft_ms=1_000), hold)) for _ in range(3)]
    await settle()
    assert door.waiting == 0
    hold.set()
    await asyncio.gather(*running)
    await door.close()


async def test_a_refusal_is_an_error_with_reason_and_hint() -> None:
    door = entry(Workers(prefill=BUSY))
    started_s = time.monotonic()
    with pytest.raises(Overloaded) as refused:
        await run(door, request(ttft_ms=500), asyncio.Event())
    assert time.monotonic() - started_s < 0.02
    assert refused.value.reason == "ttft"
    assert refused.value.retry_after_ms == pytest.approx(600, abs=50)
    assert (door.waiting, door._turns) == (0, {})


async def test_the_line_moves_as_soon_as_workers_have_time() -> None:
    workers, hold = Workers(prefill=BUSY), asyncio.Event()
    door = entry(workers)
    waits = asyncio.create_task(run(door, request(ttft_ms=60_000), hold))
    await settle()
    assert door.waiting == 1
    workers.prefill.load = IDLE
    await settle()
    assert door.waiting == 0
    hold.set()
    await waits
    await door.close()


async def test_who_cannot_be_in_time_any_more_is_shed() -> None:
    workers = Workers(prefill=BUSY)
    door = entry(workers)
    waits = asyncio.create_task(run(door, request(ttft_ms=2000), asyncio.Event()))
    await settle()
    workers.prefill.load = replace(BUSY, waiting_tokens=9000)
    with pytest.raises(Overloaded) as shed:
        await waits
    assert shed.value.reason == "shed"
    assert door._learner.at(time.monotonic()).ttft_factor > 1.0  # a broken promise
    await door.close()


async def test_who_gave_way_to_a_higher_class_proves_no_prediction_wrong() -> None:
    door = entry(Workers(prefill=BUSY), max_waiting=1)
    waits = asyncio.create_task(run(door, request(ttft_ms=60_000, budget_s=100.0), asyncio.Event()))
    await settle()
    higher = replace(request(ttft_ms=60_000, budget_s=100.0), priority=10)
    comes = asyncio.create_task(run(door, higher, asyncio.Event()))
    with pytest.raises(Overloaded) as shed:
        await waits
    assert shed.value.reason == "shed"
    assert door._learner.at(time.monotonic()).ttft_factor == 1.0
    assert door.waiting == 1
    comes.cancel()
    await asyncio.gather(comes, return_exceptions=True)
    await door.close()


async def test_the_deadline_ends_waiting() -> None:
    door = entry(Workers(prefill=BUSY), predict=False)
    with pytest.raises(DeadlineExceeded):
        await run(door, request(budget_s=0.05), asyncio.Event())
    assert door.waiting == 0
    await door.close()


async def test_a_deadline_that_has_passed_is_no_overload() -> None:
    door = entry(Workers(prefill=BUSY))
    with pytest.raises(DeadlineExceeded):
        async with door.turn(request(budget_s=0.1), ANYBODY, arrived_s=time.monotonic() - 1.0, uncached_tokens=100):
            pass
    assert (door.waiting, door._turns) == (0, {})


async def test_a_client_that_leaves_the_line_leaves_nothing() -> None:
    door = entry(Workers(prefill=BUSY))
    waits = asyncio.create_task(run(door, request(), asyncio.Event()))
    await settle()
    waits.cancel()
    await asyncio.gather(waits, return_exceptions=True)
    assert (door.waiting, door._turns) == (0, {})
    await door.close()


async def test_a_turn_that_comes_while_its_client_leaves_is_nobodys(caplog: pytest.LogCaptureFixture) -> None:
    workers = Workers(prefill=BUSY)
    door = entry(workers)
    waits = asyncio.create_task(run(door, request(), asyncio.Event()))
    await settle()
    waits.cancel()
    workers.prefill.load = IDLE
    door._advance()  # before its task has run again
    with pytest.raises(asyncio.CancelledError):
        await waits
    assert (door.waiting, door._turns, door._admission.unanswered) == (0, {}, 0)
    assert not caplog.records
    await door.close()


async def test_tenants_have_limits_of_their_own_and_get_back_what_did_not_come() -> None:
    door, hold = entry(requests_per_minute=1), asyncio.Event()
    hold.set()
    tenant = Caller("acme", TenantLimits(tokens_per_minute=300))
    for _ in range(2):  # 150 asked for each time, 101 used
        await run(door, request(), hold, tenant)
    with pytest.raises(Overloaded) as refused:
        await run(door, request(), hold, tenant)
    assert refused.value.reason == "rate_limit_exceeded"
    assert refused.value.retry_after_ms == pytest.approx(1e3 * (150 - (300 - 202)) * 60 / 300, rel=0.02)
    await run(door, request(), hold)
    with pytest.raises(Overloaded):
        await run(door, request(), hold)  # without a key: the configured limit
    await door.close()


async def test_what_was_refused_costs_no_tokens() -> None:
    door = entry(Workers(prefill=BUSY))
    tenant = Caller("acme", TenantLimits(tokens_per_minute=150))
    for _ in range(3):
        with pytest.raises(Overloaded) as refused:
            await run(door, request(ttft_ms=500), asyncio.Event(), tenant)
        assert refused.value.reason == "ttft"


async def test_it_learns_from_what_came() -> None:
    workers, hold = Workers(replace(IDLE, prompt_token_s=1e-6), replace(IDLE, step_s=1e-4)), asyncio.Event()
    door = entry(workers)
    hold.set()
    for _ in range(20):
        async with door.turn(request(), ANYBODY, arrived_s=time.monotonic(), uncached_tokens=100) as turn:
            for _ in range(6):
                await asyncio.sleep(0.002)
                door.came(turn, 1)
    learned = door._learner.at(time.monotonic())
    assert 0.002 < learned.first_s < 0.05  # what a first token cost beyond its prompt
    assert 0.01 < learned.seat_s < 0.2
    assert learned.tpot_factor > 2.0  # 2 ms came where 0.1 ms were predicted
    assert not math.isclose(learned.ttft_factor, 1.0)


async def test_a_first_token_that_was_overtaken_says_nothing_about_the_model() -> None:
    workers, hold = Workers(prefill=BUSY), asyncio.Event()
    door = entry(workers)
    late = asyncio.create_task(run(door, request(ttft_ms=50_000, budget_s=100.0), hold))
    await settle()
    early = asyncio.create_task(run(door, request(ttft_ms=30_000, budget_s=100.0), hold))
    await settle()
    assert [claim.number for claim in door._admission.waiting] == [1, 0]
    workers.prefill.load = replace(IDLE, prompt_token_s=0.001)
    await settle()
    assert [turn.overtaken for turn in door._turns.values()] == [True, False]
    hold.set()
    await asyncio.gather(late, early)
    await door.close()
