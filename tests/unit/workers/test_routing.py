"""Real workers tell a router what they have cached, and it sends requests there."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from baton.blocks import BLOCK_TOKENS, block_names
from baton.config import Config, parse
from baton.wire import inference_pb2 as pb
from engine.build import load_model
from engine.model import Model

if TYPE_CHECKING:
    from tests.unit.workers.conftest import Found, House

POOL = {"kv_tokens": 4096, "threads": 1}
PROMPT = [1000 + index % 700 for index in range(4 * BLOCK_TOKENS - 4)]


def config(**router: Any) -> Config:
    return parse(
        {
            "model": {"dtype": "float32", "max_context": 1024},
            "prefill": POOL | {"page_tokens": 16},
            "decode": POOL | {"page_tokens": 48},  # neither divides a block nor is divided by one
            "handoff": {"transport": "tcp", "landing_bytes": 64 << 20, "staging_bytes": 64 << 20},
            "router": router,
        }
    )


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Model:
    return load_model(model_folder, "float32", 1)


async def answer(house: House, prompt: list[int], tokens: int, session: str = "") -> tuple[list[int], pb.StageLedger]:
    """The output and where its time went."""
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True),
        handoff=pb.Handoff(codec="raw"),
        session=session,
    )
    responses = [one async for one in house.service.stream(request, arrived_s=time.monotonic())]
    return [token for one in responses for token in one.token_ids], responses[-1].ledger


async def held(house: House, tokens: list[int], wanted: dict[str, int]) -> None:
    """Until the router knows of so many tokens at each worker; what was only expected has been told by then."""
    generations = {name: worker.generation for name, worker in house.workers.items()}
    async with asyncio.timeout(5):
        while True:
            later_s = time.monotonic() + 60
            known = house.service.pools.index.match(block_names(tokens), later_s)
            if {name: known.get(generation) for name, generation in generations.items()} == wanted:
                return
            await asyncio.sleep(0.02)


async def test_a_prompt_returns_to_where_it_is_cached_and_a_conversation_to_its_decode_worker(
    found: Found, model: Model
) -> None:
    async with found(model, config(), prefill=2, decode=2) as house:
        output, ledger = await answer(house, PROMPT, 100)
        assert ledger.transfer_bytes > 0
        exposed_s = sum(stage.seconds for stage in ledger.stages if stage.name in ("encode", "wire", "land"))
        cost_s = max(peer.view().handoff_token_s for peer in house.service.pools.of("decode"))
        assert cost_s == pytest.approx(exposed_s / len(PROMPT), rel=0.5)  # nothing, when prefill hid all of it
        # p0: 252 tokens in pages of 16. d0: all but the last token's KV, 351, in pages of 48.
        turn = [*PROMPT, *output, *range(10)]
        await held(house, turn, {"p0": 192, "p1": 0, "d0": 320, "d1": 0})

        again, _ = await answer(house, PROMPT, 4)
        assert again == output[:4]
        assert house.workers["p0"].load().prefix_hit_tokens >= 192
        assert house.workers["p1"].load().prefix_lookup_tokens == 0

        local, ledger = await answer(house, turn, 4)
        assert ledger.transfer_bytes == 0  # 42 new tokens where the conversation is, instead of 170 and a handoff
        house.service.pools.index.forget(house.workers["d0"].generation)
        remote, ledger = await answer(house, turn, 4)
        assert ledger.transfer_bytes > 0
        assert local == remote


async def test_sessions_stay_together(found: Found, model: Model) -> None:
    async with found(model, config(strategy="session", local_prefill=False), prefill=2, decode=2) as house:
        for session in ("ann", "bob", "cyd", "dan"):
            before = {name: worker.load().prefix_lookup_tokens for name, worker in house.workers.items()}
            for number in range(2):
                await answer(house, [number, *PROMPT[:20]], 2, session)
            worked = [n for n, w in house.workers.items() if w.load().prefix_lookup_tokens > before[n]]
            assert len([name for name in worked if name.startswith("p")]) == 1, session
