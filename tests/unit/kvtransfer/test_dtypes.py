"""Pools whose dtype and page size differ: every combination of small ones, through a real sender and receiver."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import torch

from baton.config_handoff import CODECS, HandoffConfig
from baton.layout import DTYPES, KVLayout
from baton.request import TokenEvent
from kvtransfer.codecs.block import TORCH_DTYPES
from kvtransfer.handoff import Landed
from kvtransfer.protocol import BLOCK_RAW_BYTES, block_tokens
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.wire import Wire

LAYERS, HEADS, DIM = 2, 2, 8
PAGES = (1, 2, 3, 5)
LENGTHS = (1, 2, 4, 5, 7, 11)
CONFIG = HandoffConfig(transport="loopback", landing_bytes=8 << 20, staging_bytes=8 << 20)


class Pages:
    """[layers, K and V, pages, page_tokens, heads, dim] behind a table that is no identity."""

    def __init__(self, dtype, tokens, page_tokens):
        count = -(-tokens // page_tokens)
        self.table = torch.randperm(count, generator=torch.Generator().manual_seed(page_tokens))
        self.page_tokens, self.dtype = page_tokens, TORCH_DTYPES[dtype]
        self.data = torch.full((LAYERS, 2, count, page_tokens, HEADS, DIM), float("nan"), dtype=self.dtype)

    def _at(self, start, count):
        tokens = torch.arange(start, start + count)
        return self.table[tokens // self.page_tokens], tokens % self.page_tokens

    def write(self, layer, start, keys, values):
        assert keys.dtype == values.dtype == self.dtype
        page, slot = self._at(start, keys.shape[0])
        self.data[layer, 0, page, slot], self.data[layer, 1, page, slot] = keys, values

    def read(self, layer, start, count):
        page, slot = self._at(start, count)
        return self.data[layer, 0, page, slot], self.data[layer, 1, page, slot]


def _layout(dtype):
    return KVLayout("m", LAYERS, HEADS, DIM, dtype)


@pytest.mark.parametrize("theirs", DTYPES)
@pytest.mark.parametrize("ours", DTYPES)
def test_every_pair_of_dtypes_and_page_sizes_lands_what_was_sent(theirs, ours):
    async def run():
        sender = Sender(_layout(theirs), CONFIG, worker_id="p", generation="gp")
        receiver = Receiver(_layout(ours), CONFIG, worker_id="d", generation="gd")
        await sender.start()
        await receiver.start()
        shapes = itertools.product(("raw", "lossless"), PAGES, PAGES, LENGTHS)
        for number, (codec, sent_page, landed_page, tokens) in enumerate(shapes):
            want = torch.randn(LAYERS, 2, tokens, HEADS, DIM, generator=torch.Generator().manual_seed(number))
            source, target = Pages(theirs, tokens, sent_page), Pages(ours, tokens, landed_page)
            for layer in range(LAYERS):
                source.write(layer, 0, *want[layer].to(source.dtype))
            ticket = receiver.reserve(
                f"r{number}", 1, tokens=tokens, codec=codec, budget_s=10.0, write=target.write
            )  # fmt: skip
            await _send(sender, ticket, source, tokens)
            outcome = await receiver.outcome(f"r{number}")
            await receiver.release(f"r{number}")
            assert isinstance(outcome, Landed), outcome
            assert outcome.dtype == theirs
            for layer in range(LAYERS):
                for got, sent in zip(target.read(layer, 0, tokens), want[layer], strict=True):
                    assert torch.equal(got, sent.to(source.dtype).to(target.dtype))
        async with asyncio.timeout(2):  # the last block's landing buffer is given back just after the outcome is known
            while receiver.stats().landing_bytes_used:
                await asyncio.sleep(0.01)
        assert (receiver.stats().leases, receiver.stats().quarantined_bytes) == (0, 0)
        assert sender.stats().staging_bytes_used == 0
        await sender.close()
        await receiver.close()

    asyncio.run(run())


async def _send(sender, ticket, source, tokens):
    """In chunks of three tokens, layer by layer, as an engine computes them."""
    outgoing = sender.open(ticket, tokens=tokens, budget_s=10.0, gather=source.read)
    for start in range(0, tokens, 3):
        for layer in range(LAYERS):
            outgoing.push(layer, start, min(3, tokens - start))
    outgoing.finish(TokenEvent(ticket.request_id, 0, 1))
    await outgoing.outcome()


def test_only_the_dtype_may_differ():
    for dtype in DTYPES:
        assert _layout(dtype).family == _layout("float32").family
    assert len({_layout(dtype).fingerprint for dtype in DTYPES}) == len(DTYPES)
    others = [KVLayout("n", 2, 2, 8, "float32"), KVLayout("m", 3, 2, 8, "float32"), KVLayout("m", 2, 4, 8, "float32")]
    others.append(KVLayout("m", 2, 2, 16, "float32"))
    assert len({layout.family for layout in [_layout("float32"), *others]}) == 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [(1, 8), (2, 64), (8, 128), (32, 256)])
def test_blocks_are_bounded_by_the_senders_dtype(dtype, heads, dim):
    layout = KVLayout("m", 1, heads, dim, dtype)
    wire, most = Wire(layout), block_tokens(layout)
    assert most * layout.layer_token_bytes <= BLOCK_RAW_BYTES
    for codec in CODECS:
        assert 0 < wire.bound(codec, 1) <= wire.bound(codec, most) <= wire.largest_block
        assert wire.bound(codec, most + 1) == wire.bound(codec, 0) == wire.bound(codec, -1) == 0
    assert wire.bound("zip", 1) == 0
