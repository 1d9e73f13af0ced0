"""The two ends of a handoff as the benches drive them: real sender and receiver, real paged caches, no model.

KV comes from a seed, so that the landing end can check every byte without having seen the other's, or from a file.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from baton.config_handoff import HandoffConfig
from baton.layout import KVLayout
from baton.messages import Ticket
from baton.request import TokenEvent
from engine.cache import TORCH_DTYPES, KVCache
from kvtransfer.codecs import make_codec
from kvtransfer.handoff import Outcome
from kvtransfer.outgoing import Outgoing
from kvtransfer.pages import Paged, Rows
from kvtransfer.protocol import block_tokens
from kvtransfer.receiver import Receiver, ReceiverStats
from kvtransfer.sender import Sender, SenderStats

UNTOUCHED = float("nan")  # no KV is; tensors are compared by their bits


@dataclass(frozen=True, slots=True)
class Push:
    """Tokens [start, start + count) of ``layer`` are computed ``due_s`` after the prompt was begun."""

    due_s: float
    layer: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Ended:
    """``at_s``: a reading of CLOCK_MONOTONIC, which processes of one machine share."""

    outcome: Outcome
    at_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """(layer, token) rows of one request's pages, by what is in them."""

    right: int
    wrong: int
    untouched: int


def seeded(layout: KVLayout, tokens: int, seed: int) -> list[Tensor]:
    """KV by layer, [tokens, 2 * kv_heads, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, 2 * layout.kv_heads, layout.head_dim)
    return [torch.randn(shape, generator=generator).to(TORCH_DTYPES[layout.dtype]) for _ in range(layout.layers)]


def stored(path: Path) -> list[Tensor]:
    """KV by layer, from a file that ``torch.save`` wrote."""
    layers: list[Tensor] = torch.load(path, weights_only=True)
    return layers


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


class Pages:
    """A paged cache whose free pages hold nothing but ``UNTOUCHED``."""

    def __init__(self, layout: KVLayout, *, tokens: int, page_tokens: int) -> None:
        count = -(-tokens // page_tokens)
        self.cache = KVCache(layout, pages=count, page_tokens=page_tokens, device=torch.device("cpu"))
        for layer in self.cache.layers:
            layer.fill_(UNTOUCHED)
        self._free = list(range(count))
        random.Random(count).shuffle(self._free)  # no block table is in order

    def take(self, tokens: int) -> list[int]:
        count = -(-tokens // self.cache.page_tokens)
        if count > len(self._free):
            raise RuntimeError(f"{len(self._free)} pages free, {count} wanted")
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give(self, pages: Sequence[int]) -> None:
        slots = self._slots(pages)
        for layer in self.cache.layers:
            layer[slots] = UNTOUCHED
        self._free += pages

    def dirty(self) -> int:
        """Rows of free pages that somebody wrote after they were given back."""
        slots = self._slots(self._free)
        return sum(int((~layer[slots].isnan()).any(dim=(1, 2)).sum()) for layer in self.cache.layers)

    def compare(self, pages: Sequence[int], want: Sequence[Tensor]) -> Verdict:
        """Rows of ``pages`` against ``want``, KV by layer."""
        right = untouched = total = 0
        for layer, wanted in zip(self.cache.layers, want, strict=True):
            rows = layer[self._slots(pages)[: wanted.shape[0]]]
            right += int((bits(rows) == bits(wanted)).all(dim=(1, 2)).sum())
            untouched += int(rows.isnan().all(dim=(1, 2)).sum())
            total += wanted.shape[0]
        return Verdict(right, total - right - untouched, untouched)

    def _slots(self, pages: Sequence[int]) -> Tensor:
        size = self.cache.page_tokens
        return (torch.tensor(pages, dtype=torch.int64)[:, None] * size + torch.arange(size)).flatten()


class SendEnd:
    """A prefill worker without an engine: a thread pushes layers when they are due."""

    async def start(
        self, layout: KVLayout, config: HandoffConfig, *, worker_id: str, generation: str, tokens: int,
        host: str = "127.0.0.1", page_tokens: int = 16,
    ) -> None:  # fmt: skip
        torch.set_num_threads(1)
        self._layout = layout
        self._pages = Pages(layout, tokens=tokens, page_tokens=page_tokens)
        self._tables: dict[str, list[int]] = {}
        self._outgoing: dict[str, Outgoing] = {}
        self._finished_s: dict[str, float] = {}
        self._sender = Sender(layout, config, worker_id=worker_id, generation=generation, host=host)
        await self._sender.start()

    async def close(self) -> None:
        await self._sender.close()

    async def put(self, name: str, tokens: int, source: int | Path) -> None:
        """Pages called ``name`` with a prompt's KV: of a seed, or from a file."""
        layers = seeded(self._layout, tokens, source) if isinstance(source, int) else stored(source)
        table = self._tables[name] = self._pages.take(tokens)
        for index, layer in enumerate(layers):
            self._pages.cache.scatter(index, table, 0, *layer[:tokens].chunk(2, dim=1))

    async def drop(self, name: str) -> None:
        self._pages.give(self._tables.pop(name))

    async def offer(
        self, ticket: Ticket, name: str, pushes: Sequence[Push], *, tokens: int, budget_s: float,
        first: int = 0, finish: bool = True, slow_s: float = 0.0, break_layer: int = -1,
    ) -> None:  # fmt: skip
        """Hands ``name``'s pages over. ``slow_s``: what gathering takes longer; ``break_layer`` cannot be gathered."""
        located, request_id = self._pages.cache.locator(self._tables[name]), ticket.request_id

        def gather(layer: int, start: int, count: int) -> Rows:
            if slow_s:
                time.sleep(slow_s)
            if layer == break_layer:
                raise OSError("a broken cache")
            return Rows(*located(layer, start, count))

        outgoing = self._sender.open(ticket, tokens=tokens, budget_s=budget_s, gather=gather)
        self._outgoing[request_id] = outgoing

        def compute() -> None:  # an engine's thread
            begun_s = time.monotonic()
            for push in pushes:
                if (wait_s := begun_s + push.due_s - time.monotonic()) > 0:
                    time.sleep(wait_s)
                outgoing.push(push.layer, push.start, push.count)
            self._finished_s[request_id] = time.monotonic()
            if finish:
                outgoing.finish(TokenEvent(request_id, 0, first))

        await asyncio.to_thread(compute)

    async def blast(self, host: str, port: int, nbytes: int) -> None:
        """Sends ``nbytes`` of its own cache over a plain connection, one block after the other."""

        def send() -> None:
            block = self._pages.cache.layers[0].view(torch.uint8).flatten().numpy().data[: 1 << 20]
            with socket.create_connection((host, port)) as sock:
                for _ in range(nbytes // len(block) + 1):
                    sock.sendall(block)

        await asyncio.to_thread(send)

    async def abort(self, request_id: str) -> None:
        self._outgoing[request_id].abort("given up")

    async def ended(self, request_id: str) -> Ended:
        """The outcome, and when the first token was there; nothing reads the pages any more."""
        outgoing = self._outgoing[request_id]
        outcome = await outgoing.outcome()
        await outgoing.encoded()
        del self._outgoing[request_id]
        return Ended(outcome, self._finished_s.pop(request_id, 0.0))

    async def scribble(self, seed: int) -> int:
        """Flips one bit in every hundredth byte that is staged and signed, as broken memory would; how many. What is
        being encoded is left alone: the digest promises nothing of bits that flip before it is made."""
        memory, generator, flipped = self._sender._staging.memory, random.Random(seed), 0
        with self._sender._encoder.changed:
            regions = [region for one in self._outgoing.values() for region in one._feed.regions.values()]
            for region in regions:
                view = memory.view(region.offset, region.nbytes)
                for start in range(0, len(view), 100):
                    at = generator.randrange(start, min(start + 100, len(view)))
                    view[at] ^= 1 << generator.randrange(8)
                    flipped += 1
        return flipped

    async def stats(self) -> SenderStats:
        return self._sender.stats()

    async def dirty(self) -> int:
        return self._pages.dirty()


class LandEnd:
    """A decode worker without an engine."""

    async def start(
        self, layout: KVLayout, config: HandoffConfig, *, worker_id: str, generation: str, tokens: int,
        host: str = "127.0.0.1", page_tokens: int = 16,
    ) -> None:  # fmt: skip
        torch.set_num_threads(1)
        self._layout = layout
        self._pages = Pages(layout, tokens=tokens, page_tokens=page_tokens)
        self._tables: dict[str, list[int]] = {}
        self._codecs = {name: make_codec(name, layout) for name in ("raw", "lossless", "int8", "int4")}
        self._receiver = Receiver(layout, config, worker_id=worker_id, generation=generation, host=host)
        await self._receiver.start()

    async def close(self) -> None:
        await self._receiver.close()

    async def reserve(
        self, request_id: str, epoch: int, *, tokens: int, codec: str, floor: str = "exact", budget_s: float,
        slow_s: float = 0.0, break_layer: int = -1,
    ) -> Ticket:  # fmt: skip
        """``slow_s``: what a write takes longer; ``break_layer`` cannot be written."""
        table = self._pages.take(tokens)
        located = self._pages.cache.locator(table)

        def locate(layer: int, start: int, count: int) -> Rows:
            if slow_s:
                time.sleep(slow_s)
            if layer == break_layer:
                raise OSError("a broken cache")
            return Rows(*located(layer, start, count))

        self._tables[request_id] = table
        return self._receiver.reserve(
            request_id, epoch, tokens=tokens, codec=codec, floor=floor, budget_s=budget_s, write=Paged(locate)
        )

    async def ended(self, request_id: str) -> Ended:
        return Ended(await self._receiver.outcome(request_id), time.monotonic())

    async def verdict(
        self, request_id: str, tokens: int, source: int | Path, codec: str, pushes: Sequence[Push]
    ) -> Verdict:
        """What is in the request's pages, against ``source`` after ``codec``."""
        want = seeded(self._layout, tokens, source) if isinstance(source, int) else stored(source)
        if codec not in ("raw", "lossless"):
            want = self._through(codec, want, pushes)
        return self._pages.compare(self._tables[request_id], [layer[:tokens] for layer in want])

    def _through(self, name: str, layers: Sequence[Tensor], pushes: Sequence[Push]) -> list[Tensor]:
        """``layers`` encoded and decoded in the blocks that a handoff of ``pushes`` cuts."""
        codec, most = self._codecs[name], block_tokens(self._layout)
        room = memoryview(bytearray(codec.bound(most)))
        decoded = [layer.clone() for layer in layers]
        for push in pushes:
            for start in range(push.start, push.start + push.count, most):
                count = min(most, push.start + push.count - start)
                part = layers[push.layer][start : start + count]
                after = layers[push.layer].shape[0] - start - count
                keys, values = part.chunk(2, dim=1)
                size = codec.encode(keys, values, room, before=start, after=after)
                decoded[push.layer][start : start + count] = torch.cat(codec.decode(room[:size], count), dim=1)
        return decoded

    async def release(self, request_id: str) -> None:
        """Gives the lease up; the pages stay until ``free``."""
        await self._receiver.release(request_id)

    async def free(self, request_id: str) -> None:
        self._pages.give(self._tables.pop(request_id))

    async def stats(self) -> ReceiverStats:
        return self._receiver.stats()

    async def dirty(self) -> int:
        return self._pages.dirty()
