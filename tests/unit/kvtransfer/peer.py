"""One worker of a handoff in a process of its own, driven over a pipe. Started by ``conftest.py`` with ``connection``.

Holds KV in pages of its own size behind a shuffled block table, as a real worker does; values are a pure function of a
seed, so that the receiving process can check every bit without having seen the sender's.
"""

import asyncio
import functools
import hashlib
import itertools
import os
import signal
import threading
import time
import traceback

import numpy
import torch

import kvtransfer.encoder
from baton.config_handoff import HandoffConfig
from baton.errors import BatonError
from baton.layout import KVLayout
from baton.messages import Ticket
from baton.request import TokenEvent
from kvtransfer.arena import HostMemory
from kvtransfer.handoff import Landed
from kvtransfer.probe import Pattern
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender
from kvtransfer.transports import FetchLost, make_exporter, make_fetcher

torch.set_num_threads(1)


def sequence(layout, tokens, seed):
    """KV [layers, 2, tokens, kv_heads, head_dim] that both processes can compute."""
    random = torch.Generator().manual_seed(seed)
    shape = (layout.layers, 2, tokens, layout.kv_heads, layout.head_dim)
    dtype = torch.float32 if layout.dtype == "float32" else torch.bfloat16
    return torch.randn(shape, generator=random).to(dtype)


LANDING_BYTES = 48 << 20


@functools.lru_cache(maxsize=2)
def pattern(seed, nbytes):
    """Random bytes of which a shorter pattern of the same seed is the beginning."""
    return numpy.random.default_rng(seed).bytes(nbytes)


class Pages:
    """KV of one sequence in pages [layers, 2, pages, page_tokens, kv_heads, head_dim] in no particular order."""

    def __init__(self, layout, tokens, page_tokens, seed):
        pages = -(-tokens // page_tokens)
        self.tokens, self.page_tokens = tokens, page_tokens
        self.table = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))
        dtype = torch.float32 if layout.dtype == "float32" else torch.bfloat16
        self.data = torch.full(
            (layout.layers, 2, pages, page_tokens, layout.kv_heads, layout.head_dim), float("nan"), dtype=dtype
        )

    def slots(self, start, count):
        at = torch.arange(start, start + count)
        return self.table[at // self.page_tokens], at % self.page_tokens

    def write(self, layer, start, keys, values):
        page, slot = self.slots(start, keys.shape[0])
        self.data[layer, 0, page, slot] = keys
        self.data[layer, 1, page, slot] = values

    def read(self, layer, start, count):
        page, slot = self.slots(start, count)
        return self.data[layer, 0, page, slot], self.data[layer, 1, page, slot]


class Peer:
    def __init__(self):
        self.pages, self.outgoing, self.writes = {}, {}, {}
        self.sources, self.fetcher, self.exporter, self.ended = [], None, None, None
        self.names = itertools.count()
        self.go = threading.Event()
        self.go.set()

    async def start_sender(self, layout, config, worker_id="p0", generation="gp"):
        self.layout = KVLayout(**layout)
        self.sender = Sender(self.layout, HandoffConfig(**config), worker_id=worker_id, generation=generation)
        await self.sender.start()

    async def start_receiver(self, layout, config, worker_id="d0", generation="gd"):
        self.layout = KVLayout(**layout)
        self.receiver = Receiver(self.layout, HandoffConfig(**config), worker_id=worker_id, generation=generation)
        await self.receiver.start()

    # Many handoffs, and large ones, without a word per handoff.

    async def reserve_many(self, count, tokens):
        return [await self.reserve(f"r{number}", tokens=tokens) for number in range(count)]

    async def send_many(self, tickets, tokens):
        """All at once; the slowest call of an engine's thread, in seconds."""
        random = torch.Generator().manual_seed(1)
        kv = torch.randn(len(tickets) + tokens, 2, self.layout.kv_heads, self.layout.head_dim, generator=random)
        slowest = 0.0

        def compute(number, ticket):
            window = kv[number : number + tokens]
            outgoing = self.sender.open(
                Ticket(**ticket), tokens=tokens, budget_s=60.0,
                gather=lambda layer, start, count: (window[start : start + count, 0], window[start : start + count, 1]),
            )  # fmt: skip
            self.outgoing[ticket["request_id"]] = outgoing
            started = time.monotonic()
            for layer in range(self.layout.layers):
                outgoing.push(layer, 0, tokens)
            outgoing.finish(TokenEvent(ticket["request_id"], 0, number))
            return time.monotonic() - started

        for number, ticket in enumerate(tickets):
            slowest = max(slowest, compute(number, ticket))
            await asyncio.sleep(0)
        return slowest

    async def land_many(self, count, tokens):
        """How many landed, exactly; they are released."""
        random = torch.Generator().manual_seed(1)
        kv = torch.randn(count + tokens, 2, self.layout.kv_heads, self.layout.head_dim, generator=random)
        exact = 0
        for number in range(count):
            name = f"r{number}"
            outcome = await self.receiver.outcome(name)
            good = isinstance(outcome, Landed) and outcome.first.token == number
            for layer in range(self.layout.layers):
                keys, values = self.pages[name].read(layer, 0, tokens)
                window = kv[number : number + tokens]
                good = good and torch.equal(keys, window[:, 0]) and torch.equal(values, window[:, 1])
            exact += good
            await self.receiver.release(name)
            del self.pages[name]
        return exact

    async def reserve_pattern(self, request_id, tokens):
        self.pattern = Pattern(self.layout, tokens)
        ticket = self.receiver.reserve(
            request_id, 1, tokens=tokens, codec="raw", budget_s=120.0, write=self.pattern.compare
        )  # fmt: skip
        return {name: getattr(ticket, name) for name in Ticket.__slots__}

    async def send_pattern(self, ticket, tokens, chunk):
        """Pushes as an engine does, whose calls return at once; the slowest of them, in seconds."""
        pattern = Pattern(self.layout, tokens)
        outgoing = self.sender.open(Ticket(**ticket), tokens=tokens, budget_s=120.0, gather=pattern.gather)
        self.outgoing[ticket["request_id"]] = outgoing

        def compute():
            slowest = 0.0
            for start in range(0, tokens, chunk):
                for layer in range(self.layout.layers):
                    started = time.monotonic()
                    outgoing.push(layer, start, min(chunk, tokens - start))
                    slowest = max(slowest, time.monotonic() - started)
            outgoing.finish(TokenEvent(ticket["request_id"], 0, 1))
            return slowest

        return await asyncio.to_thread(compute)

    async def pattern_is_exact(self):
        return self.pattern.exact

    async def stop_sender(self):
        await self.sender.close()

    async def stop_receiver(self):
        await self.receiver.close()

    # The decode side.

    async def reserve(self, request_id, epoch=1, *, tokens, codec="raw", budget_s=30.0, page_tokens=16, slow_s=0.0):
        pages = self.pages[request_id] = Pages(self.layout, tokens, page_tokens, seed=epoch)
        self.writes[request_id] = 0

        def write(layer, start, keys, values):
            self.writes[request_id] += 1
            self.go.wait(20)
            time.sleep(slow_s)
            pages.write(layer, start, keys, values)

        ticket = self.receiver.reserve(
            request_id, epoch, tokens=tokens, codec=codec, budget_s=budget_s, write=write
        )  # fmt: skip
        return {name: getattr(ticket, name) for name in Ticket.__slots__}

    async def hold(self):
        """Writes wait, with the landing thread in them, until ``resume``."""
        self.go.clear()

    async def resume(self):
        self.go.set()

    async def writes_of(self, request_id):
        return self.writes[request_id]

    async def received(self, request_id):
        return await self.receiver.outcome(request_id)

    async def release(self, request_id):
        await self.receiver.release(request_id)

    async def matches(self, request_id, seed, tolerance=0.0):
        """Whether every token of every layer is what ``seed`` says, bit by bit unless a tolerance is given."""
        pages = self.pages[request_id]
        want = sequence(self.layout, pages.tokens, seed)
        for layer in range(self.layout.layers):
            for got, wanted in zip(pages.read(layer, 0, pages.tokens), want[layer], strict=True):
                close = torch.allclose(got, wanted, atol=tolerance, rtol=0.0) if tolerance else torch.equal(got, wanted)
                if not close:
                    return False
        return True

    async def receiver_stats(self):
        return self.receiver.stats()

    # The prefill side.

    async def send(
        self, ticket, seed, *, tokens, page_tokens=7, chunk=64, finish=True, budget_s=30.0, slow_s=0.0, break_layer=-1,
        last=None,
    ):  # fmt: skip
        """Prefills ``last`` or all tokens in chunks, layer by layer; ``slow_s`` is what gathering a block takes."""
        pages = Pages(self.layout, tokens, page_tokens, seed=-seed)
        kv = sequence(self.layout, tokens, seed)
        for layer in range(self.layout.layers):
            pages.write(layer, 0, *kv[layer])

        def gather(layer, start, count):
            time.sleep(slow_s)
            if layer == break_layer:
                raise OSError("a broken cache")
            return pages.read(layer, start, count)

        ticket = Ticket(**ticket)
        outgoing = self.sender.open(ticket, tokens=tokens, budget_s=budget_s, gather=gather)
        self.outgoing[ticket.request_id] = outgoing
        first = TokenEvent(ticket.request_id, 0, seed)

        def compute():  # an engine's thread
            end = last or tokens
            for start in range(0, end, chunk):
                for layer in range(self.layout.layers):
                    outgoing.push(layer, start, min(chunk, end - start))
            if finish:
                outgoing.finish(first)

        await asyncio.to_thread(compute)

    async def push(self, request_id, layer, start, count):
        self.outgoing[request_id].push(layer, start, count)

    async def finish(self, request_id):
        self.outgoing[request_id].finish(TokenEvent(request_id, 0, 7))

    async def encoded(self, request_id):
        await self.outgoing[request_id].encoded()

    async def abort(self, request_id):
        self.outgoing[request_id].abort("changed its mind")

    async def sent(self, request_id):
        return await self.outgoing[request_id].outcome()

    async def sender_stats(self):
        return self.sender.stats()

    async def family(self):
        return self.layout.family

    async def corrupt(self, layer):
        """From now on one bit of that layer's staged bytes flips after it was signed; -1 stops that."""
        signed = kvtransfer.protocol.block_digest

        def flip(encoded, **place):
            digest = signed(encoded, **place)
            if place["layer"] == layer:
                encoded[len(encoded) // 2] ^= 1
            return digest

        kvtransfer.encoder.block_digest = flip if layer >= 0 else signed

    # Memory and a transport, without the handoff.

    async def export(self, config, nbytes, seed):
        if self.exporter is not None:
            self.exporter.close()
        config = HandoffConfig(**config)
        self.exported = HostMemory(nbytes)
        self.exported.view(0, nbytes)[:] = pattern(seed, nbytes)
        self.exporter = make_exporter(
            config.transport, self.exported, name=f"p{os.getpid()}-{next(self.names)}", host="127.0.0.1",
            ucx_tls=config.ucx_tls, tls=config.tls,
        )  # fmt: skip
        return self.exporter.address()

    async def close_export(self):
        self.exporter.close()
        self.exporter = None

    async def rewrite(self, seed):
        self.exported.view(0, self.exported.nbytes)[:] = pattern(seed, self.exported.nbytes)

    async def connect(self, config, address):
        if self.fetcher is None:
            config = HandoffConfig(**config)
            self.landing = HostMemory(LANDING_BYTES)
            self.fetcher = make_fetcher(
                config.transport, self.landing, name="d", ucx_tls=config.ucx_tls, tls=config.tls
            )  # fmt: skip
        if not self.sources:
            self.landing.view(0, LANDING_BYTES)[:] = bytes(LANDING_BYTES)
        self.sources.append(await asyncio.to_thread(self.fetcher.connect, address, 5.0))
        return len(self.sources) - 1

    async def fetch(self, source, offset, nbytes, at, deadline_s):
        started = time.monotonic()
        self.ended, reason = None, ""
        try:
            await asyncio.to_thread(self.sources[source].fetch, offset, nbytes, at, deadline_s)
        except FetchLost as lost:
            self.ended, reason = lost.ended, str(lost)
        return reason, self.ended is None, time.monotonic() - started

    async def connect_and_fetch(self, address, nbytes):
        """Why that failed, or ""."""
        try:
            source = await asyncio.to_thread(self.fetcher.connect, address, 2.0)
        except FetchLost as lost:
            return str(lost)
        self.sources.append(source)
        return (await self.fetch(-1, 0, nbytes, 0, 2.0))[0]

    async def transfer_ended(self):
        return self.ended is None or await asyncio.to_thread(self.ended)

    async def interrupt(self, source):
        self.sources[source].interrupt()

    async def carrier(self, source):
        return self.sources[source].carrier()

    async def holds(self, seed, offset, nbytes, at):
        want = pattern(seed, LANDING_BYTES)[offset : offset + nbytes] if seed else bytes(nbytes)
        return bytes(self.landing.view(at, nbytes)) == bytes(want)

    async def digest(self):
        return hashlib.blake2b(self.landing.view(0, LANDING_BYTES)).digest()

    async def close_sources(self):
        for source in self.sources:
            source.close()
        self.sources.clear()

    async def busy_s(self):
        return time.process_time()

    async def threads(self):
        return sorted(thread.name for thread in threading.enumerate())


async def serve(connection):
    """Answers every command from a task of its own, so that a waiting one holds up no other."""
    peer, loop, commands = Peer(), asyncio.get_running_loop(), asyncio.Queue()

    def listen():
        try:
            while True:
                command = connection.recv()
                loop.call_soon_threadsafe(commands.put_nowait, command)
        except (EOFError, OSError):
            os.kill(os.getpid(), signal.SIGKILL)  # the test is gone

    async def answer(number, method, args, kwargs):
        try:
            connection.send((number, True, await getattr(peer, method)(*args, **kwargs)))
        except (BatonError, ValueError, RuntimeError) as error:
            connection.send((number, False, error if type(error) in (ValueError, RuntimeError) else error.code))
        except BaseException:
            traceback.print_exc()
            connection.send((number, False, "crashed"))
            raise

    threading.Thread(target=listen, daemon=True).start()
    tasks = set()
    while True:
        task = asyncio.create_task(answer(*await commands.get()))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


asyncio.run(serve(connection))  # noqa: F821  given by whoever runs this file
