"""A real sender and receiver on a link whose speed the test sets: the choice follows it in the middle of a request."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time

import pytest
import torch

import kvtransfer.receiver
import kvtransfer.sender
from baton.config_handoff import EXACT_CODECS, HandoffConfig
from baton.layout import KVLayout
from baton.request import TokenEvent
from kvtransfer.codec_speeds import measure_codecs
from kvtransfer.handoff import Landed, Lost
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.transports.loopback import LoopbackSource

LAYOUT = KVLayout("m", 60, 4, 64, "bfloat16")  # 1 KiB a token and layer
TOKENS = 256
SLOW = 20e6  # bytes per second: 13 ms for a block
FIRST = TokenEvent("r", 0, 7)


class Pair:
    def __init__(self, sender, receiver, link):
        self.sender, self.receiver, self.link = sender, receiver, link
        self.kv = torch.randn(LAYOUT.layers, 2, TOKENS, 4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
        self.landed = torch.zeros_like(self.kv)
        self.codecs = []  # of every block, in order

    def open(self, codec, floor):
        def write(layer, start, keys, values):
            self.landed[layer, 0, start : start + len(keys)] = keys
            self.landed[layer, 1, start : start + len(values)] = values

        ticket = self.receiver.reserve("r", 1, tokens=TOKENS, codec=codec, floor=floor, budget_s=60.0, write=write)
        return self.sender.open(
            ticket, tokens=TOKENS, budget_s=60.0,
            gather=lambda layer, start, count: tuple(self.kv[layer, :, start : start + count]),
        )  # fmt: skip

    async def push(self, outgoing, layers):
        """One layer after the other, each when the one before has landed."""
        for layer in layers:
            outgoing.push(layer, 0, TOKENS)
            async with asyncio.timeout(20):
                while not bool(self.landed[layer, 1, -1].any()) or self.sender.stats().staging_bytes_used:
                    await asyncio.sleep(0.001)

    async def hand_over(self, codec, floor):
        """All layers at once: prefill hides nothing."""
        self.landed.zero_()
        outgoing = self.open(codec, floor)
        for layer in range(LAYOUT.layers):
            outgoing.push(layer, 0, TOKENS)
        return await self.end(outgoing)

    async def end(self, outgoing):
        outgoing.finish(FIRST)
        landed = await self.receiver.outcome("r")
        assert isinstance(landed, Landed), landed
        assert (await outgoing.outcome()).codec_tokens == landed.codec_tokens
        await self.receiver.release("r")
        return landed


@pytest.fixture
async def pair(request, monkeypatch):
    """The deployment's floor is the parameter, or exact."""
    link = {"bytes_per_s": 0.0}
    fetch = LoopbackSource.fetch

    def throttled(source, offset, nbytes, at, deadline_s):
        waited_s = fetch(source, offset, nbytes, at, deadline_s)
        if link["bytes_per_s"]:
            time.sleep(nbytes / link["bytes_per_s"])
        return waited_s

    monkeypatch.setattr(LoopbackSource, "fetch", throttled)
    config = HandoffConfig(
        transport="loopback", landing_bytes=8 << 20, staging_bytes=8 << 20,
        quality_floor=getattr(request, "param", "exact"),
    )  # fmt: skip
    for module in (kvtransfer.receiver, kvtransfer.sender):  # on a busy machine too, every codec is a candidate
        monkeypatch.setattr(module, "measure_codecs", functools.partial(measure_codecs, budget_s=20.0))
    receiver = Receiver(LAYOUT, config, worker_id="d", generation="gd")
    sender = Sender(LAYOUT, config, worker_id="p", generation="gp")
    await receiver.start()
    await sender.start()
    yield Pair(sender, receiver, link)
    await sender.close()
    await receiver.close()


def lossy(landed):
    """(layer, token) pairs that crossed in a lossy codec: which one of two alike is the machine's to say."""
    return sum(tokens for codec, tokens in landed.codec_tokens.items() if codec not in EXACT_CODECS)


async def test_the_codec_changes_with_the_link_and_nothing_is_lost(pair):
    outgoing = pair.open("auto", "exact")
    await pair.push(outgoing, range(20))
    pair.link["bytes_per_s"] = SLOW
    await pair.push(outgoing, range(20, 40))
    pair.link["bytes_per_s"] = 0.0
    await pair.push(outgoing, range(40, 60))
    landed = await pair.end(outgoing)
    shares = {codec: tokens // TOKENS for codec, tokens in landed.codec_tokens.items()}
    assert shares.keys() == {"raw", "lossless"}
    assert shares["lossless"] >= 10
    assert shares["raw"] >= 20
    assert landed.bytes < LAYOUT.token_bytes * TOKENS
    assert torch.equal(pair.landed, pair.kv)


async def test_a_slow_link_is_probed_before_the_first_block_is_announced(pair):
    pair.link["bytes_per_s"] = SLOW
    first = pair.open("auto", "exact")
    await pair.push(first, range(60))
    assert (await pair.end(first)).codec_tokens["lossless"] > 50 * TOKENS  # the first few left before the answer came
    second = await pair.hand_over("auto", "exact")
    assert second.codec_tokens == {"lossless": LAYOUT.layers * TOKENS}
    assert torch.equal(pair.landed, pair.kv)


@pytest.mark.parametrize("pair", ["int4"], indirect=True)
async def test_lossy_levels_only_as_far_as_the_request_allows(pair):
    pair.link["bytes_per_s"] = SLOW
    exact = await pair.hand_over("auto", "exact")
    assert exact.codec_tokens.keys() <= {"raw", "lossless"}
    rough = await pair.hand_over("auto", "int8")
    assert rough.codec_tokens.keys() <= {"raw", "lossless", "int8", "int8-zstd"}
    assert lossy(rough) > 40 * TOKENS
    assert torch.allclose(pair.landed.float(), pair.kv.float(), atol=6.0 / 127)
    assert (await pair.hand_over("auto", "int4")).bytes < rough.bytes


@pytest.mark.parametrize("pair", ["int8"], indirect=True)
async def test_what_prefill_hides_is_not_made_lossy(pair):
    pair.link["bytes_per_s"] = SLOW
    outgoing = pair.open("auto", "int8")
    await pair.push(outgoing, range(60))
    hidden = await pair.end(outgoing)
    assert hidden.codec_tokens["lossless"] > 20 * TOKENS
    assert lossy(hidden) > 0  # the last ones, which nothing hides


async def test_a_fixed_codec_stays_fixed(pair):
    pair.link["bytes_per_s"] = SLOW
    assert (await pair.hand_over("raw", "exact")).codec_tokens == {"raw": LAYOUT.layers * TOKENS}


async def test_an_unknown_floor_is_refused_at_both_ends(pair):
    with pytest.raises(ValueError, match="floor 'low'"):
        pair.open("auto", "low")
    ticket = pair.receiver.reserve(
        "r", 1, tokens=TOKENS, codec="auto", budget_s=60.0, write=lambda *_: None,
    )  # fmt: skip
    assert ticket.floor == "exact"

    outgoing = pair.sender.open(
        dataclasses.replace(ticket, floor="low"), tokens=TOKENS, budget_s=60.0, gather=lambda *_: None
    )
    assert await outgoing.outcome() == Lost("codec 'auto' with floor 'low'")
    await pair.receiver.release("r")
