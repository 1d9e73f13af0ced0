"""Handoffs from and to an accelerator's pages, against the CPU's: a real sender and receiver on the loopback transport.

Kernels run interpreted where there is no GPU (tests/conftest.py chooses).
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter

import pytest
import torch

from baton.config_handoff import HandoffConfig
from baton.layout import KVLayout
from baton.request import TokenEvent
from engine.cache import KVCache
from engine.device_pages import DevicePages, device_pages
from engine.kernels.codec import PagedKernels
from kvtransfer.codec_speeds import measure_codecs
from kvtransfer.handoff import Landed, Lost
from kvtransfer.landing import Write
from kvtransfer.pages import Accelerator, Paged, Rows
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, HEADS, DIM, TOKENS, CHUNK = 2, 2, 8, 11, 6
CONFIG = HandoffConfig(transport="loopback", landing_bytes=8 << 20, staging_bytes=8 << 20)
CODECS = ("raw", "lossless", "int8", "int4", "int2", "int4-zstd")


class Counted:
    """The kernels, and how often each was asked for; one call at a time, as Triton's interpreter needs."""

    one_at_a_time = threading.Lock()

    def __init__(self):
        self.calls = Counter()

    def __getattr__(self, name):
        def call(*arguments):
            with self.one_at_a_time:
                self.calls[name] += 1
                getattr(PagedKernels(), name)(*arguments)

        return call


class End:
    """Pages of one request at one end, on the accelerator or in host memory."""

    def __init__(self, *, paged, page_tokens, dtype="float32"):
        self.layout = KVLayout("m", LAYERS, HEADS, DIM, dtype)
        count = -(-TOKENS // page_tokens)
        device = DEVICE if paged else torch.device("cpu")
        self.cache = KVCache(self.layout, pages=count + 2, page_tokens=page_tokens, device=device)
        self.pages = torch.randperm(count + 2, generator=torch.Generator().manual_seed(count))[:count].tolist()
        self.kernels, self.device = Counted(), DevicePages(self.cache) if paged else None
        self.accelerator = Accelerator(self.kernels, self.device.device) if paged else None

    def gather(self, layer, start, count):
        if self.device is None:
            return self.cache.gather(layer, self.pages, start, count)
        return Rows(*self.device.locator(self.pages)(layer, start, count))

    def write(self) -> Write:
        if self.device is None:
            return lambda layer, start, keys, values: self.cache.scatter(layer, self.pages, start, keys, values)
        device = self.device
        return Paged(lambda layer, start, count: Rows(*device.locator(self.pages)(layer, start, count)))

    def fill(self, kv):
        for layer, values in enumerate(kv):
            self.cache.write_rows(layer, self.pages, 0, values)

    def kv(self):
        return torch.stack([self.cache.rows(layer, self.pages, 0, TOKENS).cpu() for layer in range(LAYERS)])


def some_kv():
    draw = torch.Generator().manual_seed(7)
    return torch.randn(LAYERS, TOKENS, 2 * HEADS, DIM, generator=draw) * 5


async def hand_over(source, target, codecs):
    """What ``target``'s pages hold after each of ``codecs``; the source's pages are overwritten once encoded."""
    sender = Sender(source.layout, CONFIG, worker_id="p", generation="gp", accelerator=source.accelerator)
    receiver = Receiver(target.layout, CONFIG, worker_id="d", generation="gd", accelerator=target.accelerator)
    await sender.start()
    await receiver.start()
    source.kernels.calls.clear()  # of start-up's measurements
    target.kernels.calls.clear()
    landed, kv = {}, source.kv()
    for codec in codecs:
        source.fill(kv)
        target.fill(torch.full_like(kv, float("nan")))
        ticket = receiver.reserve(codec, 1, tokens=TOKENS, codec=codec, budget_s=60.0, write=target.write())
        outgoing = sender.open(ticket, tokens=TOKENS, budget_s=60.0, gather=source.gather)
        for start, layer in itertools.product(range(0, TOKENS, CHUNK), range(LAYERS)):
            outgoing.push(layer, start, min(CHUNK, TOKENS - start))
        outgoing.finish(TokenEvent(codec, 0, 1))
        await outgoing.encoded()
        source.fill(torch.full_like(kv, float("nan")))
        landed[codec] = await receiver.outcome(codec), target.kv()
        await receiver.release(codec)
    await sender.close()
    await receiver.close()
    return landed


def landed_kv(source, target, codecs, kv):
    source.fill(kv)
    found = {}
    for codec, (outcome, got) in asyncio.run(hand_over(source, target, codecs)).items():
        assert isinstance(outcome, Landed), outcome
        found[codec] = got
    return found


@pytest.fixture(scope="module")
def on_the_cpu():
    """What lands by way of the CPU alone, by codec."""
    return landed_kv(End(paged=False, page_tokens=4), End(paged=False, page_tokens=3), CODECS, some_kv())


@pytest.mark.parametrize(("there", "here"), [(True, True), (True, False), (False, True)])
def test_what_lands_is_what_the_cpu_lands(there, here, on_the_cpu):
    source, target = End(paged=there, page_tokens=4), End(paged=here, page_tokens=3)
    found = landed_kv(source, target, CODECS, some_kv())
    for codec, got in found.items():
        assert torch.equal(got, on_the_cpu[codec]), codec
    halves = 2 * LAYERS * -(-TOKENS // CHUNK)  # K's and V's of every block
    assert source.kernels.calls["split"] == (halves if there else 0)
    assert source.kernels.calls["quantise"] == (2 * halves if there else 0)  # int8 and int4; int2 keeps so few exactly
    assert target.kernels.calls["join"] == (halves if here else 0)
    assert target.kernels.calls["dequantise"] == (2 * halves if here else 0)


@pytest.mark.parametrize(("theirs", "ours"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_another_dtype_is_converted_on_its_way_into_the_pages(theirs, ours):
    source = End(paged=True, page_tokens=4, dtype=theirs)
    target = End(paged=True, page_tokens=3, dtype=ours)
    kv = some_kv().bfloat16().float()  # both dtypes hold it
    for got in landed_kv(source, target, ("raw", "lossless"), kv).values():
        assert torch.equal(got.float(), kv)
    assert source.kernels.calls["gather"]
    assert not target.kernels.calls


def test_pages_that_cannot_be_quantised_lose_the_handoff_and_no_other():
    source, target = End(paged=True, page_tokens=4), End(paged=True, page_tokens=4)
    kv = some_kv()
    kv[1, 9, 1, 3] = float("inf")
    source.fill(kv)
    found = asyncio.run(hand_over(source, target, ("int8", "raw")))
    outcome, _ = found["int8"]
    assert isinstance(outcome, Lost)
    assert "not finite" in outcome.reason
    outcome, got = found["raw"]
    assert isinstance(outcome, Landed)
    assert torch.equal(got, kv)


def test_speeds_are_those_of_the_pages():
    kernels = Counted()
    layout = KVLayout("m", LAYERS, 1, DIM, "float32")
    found = measure_codecs(
        layout, ("raw", "int8", "int8-zstd"), budget_s=60.0, accelerator=Accelerator(kernels, DEVICE)
    )
    assert [one.name for one in found] == ["raw", "int8", "int8-zstd"]
    assert kernels.calls.keys() == {"gather", "scatter", "quantise", "dequantise"}
    assert found[1].ratio == pytest.approx(measure_codecs(layout, ("int8",))[0].ratio)


def test_only_a_cache_on_one_gpu_has_device_pages():
    cache = KVCache(KVLayout("m", 1, 1, 8, "float32"), pages=1, page_tokens=4, device=DEVICE)
    assert (device_pages(cache) is None) == (DEVICE.type == "cpu")
