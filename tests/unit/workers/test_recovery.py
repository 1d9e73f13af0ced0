"""Workers are lost in the middle of requests: every stream is the one that it would have been."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from baton.config import parse
from baton.errors import DeadlineExceeded, Unavailable
from baton.messages import Ticket
from baton.wire import inference_pb2 as pb
from bench.faulty import Fault, FaultyLink
from engine.build import load_model
from engine.model import Model
from router.peers import Role

if TYPE_CHECKING:
    from tests.unit.workers.conftest import Found, House

POOL = {"kv_tokens": 4096, "threads": 1, "page_tokens": 16}
CONFIG = parse(
    {
        "model": {"dtype": "float32", "max_context": 1024},
        "prefill": POOL,
        "decode": POOL,
        "handoff": {"transport": "tcp", "landing_bytes": 64 << 20, "staging_bytes": 64 << 20, "stall_s": 1.0},
        "router": {"local_prefill": False, "recovery_s": 5.0},
    }
)
TOKENS = 24
ROLES: tuple[Role, ...] = ("prefill", "decode")
GREEDY = pb.Sampling(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
DRAWN = pb.Sampling(
    temperature=0.9, top_p=0.95, seed=11, max_tokens=TOKENS, min_tokens=20, ignore_eos=True,
    repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2, logprobs=True,
)  # fmt: skip
PROMPT = "A ship that carries a great deal of tea"
LONG = "The harbour master writes down every ship that comes in. " * 60


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Model:
    return load_model(model_folder, "float32", 1)


async def nothing(count: int) -> None:
    """Happens while tokens come, undisturbed."""


async def answer(
    house: House,
    sampling: pb.Sampling,
    prompt: str = PROMPT,
    during: Callable[[int], Awaitable[None]] = nothing,
    *,
    budget_ms: int = 20_000,
    n: int = 1,
) -> list[pb.GenerateResponse]:
    """All responses; ``during(tokens so far)`` is awaited at each."""
    responses, count = [], 0
    request = pb.GenerateRequest(
        prompt=prompt, sampling=sampling, handoff=pb.Handoff(codec="raw"), budget_ms=budget_ms, n=n
    )
    async for response in house.service.stream(request, arrived_s=time.monotonic()):
        responses.append(response)
        count += len(response.token_ids)
        await during(count)
    return responses


def tokens(responses: list[pb.GenerateResponse]) -> list[int]:
    return [token for response in responses for token in response.token_ids]


def by_output(responses: list[pb.GenerateResponse]) -> list[list[int]]:
    outputs = 1 + max(response.index for response in responses)
    return [tokens([response for response in responses if response.index == n]) for n in range(outputs)]


def at(count: int, act: Callable[[], Awaitable[None]]) -> Callable[[int], Awaitable[None]]:
    """``act`` once, when so many tokens have come."""
    acted: list[int] = []

    async def watch(so_far: int) -> None:
        if so_far >= count and not acted:
            acted.append(so_far)
            await act()

    return watch


async def idle(house: House) -> None:
    """Every worker that is left holds nothing."""
    async with asyncio.timeout(5):
        while any(
            load.running or load.waiting or load.pages_used or load.handoffs or load.buffer_bytes_used
            for load in (worker.load() for worker in house.workers.values())
        ):
            await asyncio.sleep(0.02)


def working(house: House, initial: str) -> str:
    """The worker of that kind which has something to do."""
    return next(
        n for n, w in house.workers.items() if n.startswith(initial) and (w.load().handoffs or w.load().running)
    )


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
async def test_a_decode_worker_is_lost(found: Found, model: Model, sampling: pb.Sampling) -> None:
    async with found(model, CONFIG, prefill=1, decode=2) as house:
        whole = await answer(house, sampling)
        responses = await answer(house, sampling, during=at(7, lambda: house.lose(working(house, "d"))))
        assert tokens(responses) == tokens(whole)
        assert "".join(r.text for r in responses) == "".join(r.text for r in whole)
        assert [entry.token_id for r in responses for entry in r.logprobs] == [
            entry.token_id for r in whole for entry in r.logprobs
        ]
        ledger = responses[-1].ledger
        assert sum(stage.seconds for stage in ledger.stages) == pytest.approx(ledger.total_s)
        assert {stage.name: stage.seconds for stage in ledger.stages}["recover"] > 0
        assert {stage.name: stage.seconds for stage in whole[-1].ledger.stages}["recover"] == 0
        assert house.service.report().router.retried == 1
        assert house.service.observer.meters.retries.sums == {("decode_lost",): 1}
        assert not any(peer.suspicion._strikes for role in ROLES for peer in house.service.pools.of(role))
        await idle(house)


async def test_a_stop_string_across_the_loss(found: Found, model: Model) -> None:
    free = pb.Sampling(temperature=0.9, seed=11, max_tokens=TOKENS, ignore_eos=True)
    async with found(model, CONFIG, decode=2) as house:
        responses = await answer(house, free)
        text, ends = "", list[int]()  # of the text, after each token
        for response in responses:
            text += response.text
            ends += [len(text)] * len(response.token_ids)
        stop = text[ends[6] - 2 : ends[8]]  # begins before the seventh token's end, ends with the ninth
        assert text.index(stop) == ends[6] - 2, "it must not stop before"
        stopping = pb.Sampling()
        stopping.CopyFrom(free)
        stopping.stop.append(stop)
        whole = await answer(house, stopping)
        again = await answer(house, stopping, during=at(7, lambda: house.lose(working(house, "d"))))
        assert house.service.report().router.retried == 1
        for one in (whole, again):
            assert "".join(r.text for r in one) == text[: ends[6] - 2]
            assert one[-1].finish_reason == pb.FINISH_REASON_STOP
        assert tokens(again) == tokens(whole)
        await idle(house)


async def test_two_outputs_with_biased_logits_across_the_loss(found: Found, model: Model) -> None:
    biased = pb.Sampling()
    biased.CopyFrom(DRAWN)
    async with found(model, CONFIG, decode=2) as house:
        plain = by_output(await answer(house, DRAWN, n=2))
        biased.logit_bias[plain[0][4]] = -100.0
        biased.logit_bias[plain[1][9]] = 8.0
        whole = by_output(await answer(house, biased, n=2))
        assert whole[0] != plain[0]
        assert whole[1] != plain[1]
        assert whole[0] != whole[1]
        again = await answer(house, biased, n=2, during=at(14, lambda: house.lose(working(house, "d"))))
        assert by_output(again) == whole
        assert house.service.report().router.retried >= 1
        await idle(house)


@pytest.mark.parametrize("trouble", ["stall", "flip"])
async def test_a_handoff_that_stalls_or_is_corrupted_is_repeated(
    found: Found, model: Model, monkeypatch: pytest.MonkeyPatch, trouble: Literal["stall", "flip"]
) -> None:
    async with found(model, CONFIG) as house:
        whole = tokens(await answer(house, GREEDY, LONG))
        decode: Any = house.workers["d0"]
        receiver = decode._receiver
        reserve, tickets = receiver.reserve, list[Ticket]()
        with FaultyLink("127.0.0.1", receiver.port, Fault(trouble, "data", 1 << 20), seed=1) as link:

            def first_through_the_link(*args: Any, **kwargs: Any) -> Ticket:
                tickets.append(reserve(*args, **kwargs))
                return replace(tickets[0], port=link.port) if len(tickets) == 1 else tickets[-1]

            monkeypatch.setattr(receiver, "reserve", first_through_the_link)
            assert tokens(await answer(house, GREEDY, LONG)) == whole
        assert len(tickets) == 2
        assert house.service.observer.meters.retries.sums == {("handoff_lost",): 1}
        strikes = [len(peer.suspicion._strikes) for role in ROLES for peer in house.service.pools.of(role)]
        assert strikes == [1, 1], "whose fault it was cannot be told"
        await idle(house)


async def test_a_prefill_worker_is_lost_before_the_first_token(found: Found, model: Model) -> None:
    async with found(model, CONFIG, prefill=2, decode=1) as house:
        running = asyncio.create_task(answer(house, GREEDY, LONG))
        async with asyncio.timeout(10):
            while not any(w.load().running for n, w in house.workers.items() if n.startswith("p")):
                await asyncio.sleep(0.005)
        await house.lose(working(house, "p"))
        recovered = tokens(await running)
        assert house.service.report().router.retried >= 1
        assert recovered == tokens(await answer(house, GREEDY, LONG))
        await idle(house)


async def test_the_only_decode_worker_is_replaced(found: Found, model: Model) -> None:
    async with found(model, CONFIG) as house:
        whole = tokens(await answer(house, GREEDY))

        async def replace() -> None:
            await house.lose("d0")
            asyncio.get_running_loop().call_later(0.5, lambda: hired.append(asyncio.create_task(house.hire("d1"))))

        hired: list[asyncio.Task[None]] = []
        assert tokens(await answer(house, GREEDY, during=at(3, replace))) == whole
        await idle(house)


async def test_nobody_comes_in_time(found: Found, model: Model) -> None:
    config = CONFIG.with_flags({"router.recovery_s": 0.3})
    async with found(model, config) as house:
        begun_s = time.monotonic()
        with pytest.raises(Unavailable, match="no decode worker"):
            await answer(house, GREEDY, during=at(3, lambda: house.lose("d0")))
        assert time.monotonic() - begun_s < 5
        assert house.service.report().router.inflight == 0
        await idle(house)


async def test_recovery_ends_with_the_requests_time(found: Found, model: Model) -> None:
    async with found(model, CONFIG) as house:
        with pytest.raises(DeadlineExceeded):
            await answer(house, GREEDY, during=at(1, lambda: house.lose("d0")), budget_ms=1500)


async def test_a_worker_that_leaves_finishes_what_it_has(found: Found, model: Model) -> None:
    async with found(model, CONFIG, decode=2) as house:
        whole = tokens(await answer(house, GREEDY))
        leaving: list[asyncio.Task[None]] = []

        async def leave() -> None:
            leaving.append(asyncio.create_task(house.workers[working(house, "d")].drain(10.0)))

        assert tokens(await answer(house, GREEDY, during=at(3, leave))) == whole
        await asyncio.wait_for(leaving[0], 2.0)
        assert house.service.report().router.retried == 0
        await house.ready(1, 1)
        assert tokens(await answer(house, GREEDY)) == whole, "by the one that stays"


async def test_what_outlasts_the_grace_goes_on_elsewhere(found: Found, model: Model) -> None:
    async with found(model, CONFIG, decode=2) as house:
        whole = tokens(await answer(house, GREEDY))

        async def leave() -> None:
            name = working(house, "d")
            await house.workers[name].drain(0.0)
            await house.lose(name)

        assert tokens(await answer(house, GREEDY, during=at(3, leave))) == whole
        assert house.service.report().router.retried == 1
        await idle(house)


async def test_many_streams_and_many_losses(found: Found, model: Model) -> None:
    async with found(model, CONFIG, prefill=2, decode=2) as house:
        prompts = [f"{PROMPT} number {n}, and" for n in range(8)]
        whole = [tokens(await answer(house, GREEDY, prompt)) for prompt in prompts]
        running = [asyncio.create_task(answer(house, GREEDY, prompt)) for prompt in prompts]
        for old, new in (("d0", "d2"), ("p0", "p2"), ("d1", "d3")):
            await asyncio.sleep(0.25)
            await house.hire(new)
            await house.lose(old)
        assert [tokens(responses) for responses in await asyncio.gather(*running)] == whole
        await idle(house)
