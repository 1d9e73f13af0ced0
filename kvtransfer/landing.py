"""The receiver's threads: one per peer pulls announced blocks into landing buffers, one for all verifies, decodes and
writes them. No thread of one stopped peer delays another peer's blocks, and decoding takes one core at most.

Blocks that wait together and lie side by side in the peer's memory are fetched, landed and acknowledged together: they
share what a fetch, a hand-over between threads and a message cost (docs/handoff.md).
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from torch import Tensor

from baton.config_handoff import CODECS
from baton.layout import DTYPES, KVLayout
from kvtransfer.arena import BufferPool, Region, aligned
from kvtransfer.codecs import CodecError, make_codec
from kvtransfer.codecs.block import TORCH_DTYPES
from kvtransfer.codecs.paged import PagedCodec
from kvtransfer.handoff import Arrived
from kvtransfer.pages import Accelerator, Paged, lane_of, paged_codecs
from kvtransfer.protocol import Block, block_digest
from kvtransfer.signing import BlockKey
from kvtransfer.transports import FetchLost, Source

log = logging.getLogger(__name__)

MOST_TOGETHER = 8  # blocks of one fetch: the last ones of a handoff are decoded when all of them are there
Write: TypeAlias = Callable[[int, int, Tensor, Tensor], None] | Paged


class Gate:
    """Stands between the landing thread and one request's pages. Once closed and quiet, nobody writes them again."""

    def __init__(self, on_quiet: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._on_quiet = on_quiet
        self._closed = self._inside = False

    @property
    def closed(self) -> bool:
        return self._closed

    def enter(self) -> bool:
        with self._lock:
            self._inside = not self._closed
            return self._inside

    def leave(self) -> None:
        with self._lock:
            self._inside = False
            closed = self._closed
        if closed:
            self._on_quiet()

    def close(self) -> None:
        """No writer enters any more; ``on_quiet`` is called once none is inside, maybe more than once."""
        with self._lock:
            self._closed = True
            quiet = not self._inside
        if quiet:
            self._on_quiet()


@dataclass(slots=True, eq=False)
class Landing:
    """Where one handoff's blocks go. The callbacks are called on the landing threads."""

    gate: Gate
    write: Write
    on_arrived: Callable[[tuple[Arrived, ...]], None]  # of one fetch
    on_lost: Callable[[str], None]

    def fail(self, reason: str) -> None:
        """Loses the handoff; its next block is not written even if that is at hand already."""
        self.gate.close()
        self.on_lost(reason)


@dataclass(frozen=True, slots=True)
class Wanted:
    """An announced block, and where it goes."""

    block: Block
    landing: Landing


@dataclass(frozen=True, slots=True)
class Fetched:
    """One fetch: ``run``'s blocks lie in ``region`` as far apart as in the peer's memory."""

    run: tuple[Wanted, ...]
    wire: KVLayout  # as the sender encoded them
    region: Region
    fetch_s: float
    fetched_at: float

    def place(self, wanted: Wanted) -> int:
        """Where the block begins in landing memory."""
        return self.region.offset + wanted.block.offset - self.run[0].block.offset

    def share_s(self, wanted: Wanted) -> float:
        """The block's part of the time that the fetch took."""
        return self.fetch_s * wanted.block.nbytes / sum(one.block.nbytes for one in self.run)


class Lander:
    """Verifies fetched blocks, decodes them, and writes them in the dtype of ``layout``, whatever their sender's.

    Blocks in the pages' dtype, in a codec that knows pages, are decoded straight into those that their request says.
    Its queue is bounded by the landing buffers that it holds.
    """

    def __init__(
        self, layout: KVLayout, pool: BufferPool, key: BlockKey | None = None, accelerator: Accelerator | None = None
    ) -> None:
        self._pool, self._key, self._layout = pool, key, layout
        self._dtype = TORCH_DTYPES[layout.dtype]
        self._accelerator = accelerator
        self._paged = paged_codecs(accelerator, CODECS, layout)
        self._codecs = {
            (dtype, name): make_codec(name, replace(layout, dtype=dtype)) for dtype in DTYPES for name in CODECS
        }
        self._fetched: queue.SimpleQueue[Fetched | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kv-land", daemon=True)
        self._thread.start()

    def put(self, fetched: Fetched) -> None:
        self._fetched.put(fetched)

    def close(self) -> None:
        """Lands what was put before, then ends."""
        self._fetched.put(None)
        self._thread.join()

    def _run(self) -> None:
        with lane_of(self._accelerator):
            self._land_all()

    def _land_all(self) -> None:
        while (fetched := self._fetched.get()) is not None:
            arrived: dict[Landing, list[Arrived]] = {}
            lost: dict[Landing, str] = {}
            for wanted in fetched.run:
                match self._landed(fetched, wanted):
                    case Arrived() as one:
                        arrived.setdefault(wanted.landing, []).append(one)
                    case str() as reason:
                        wanted.landing.gate.close()  # its next block is not written even if that is at hand already
                        lost.setdefault(wanted.landing, reason)
            self._pool.give(fetched.region)  # before anybody learns what became of a block
            for landing, some in arrived.items():
                landing.on_arrived(tuple(some))
            for landing, reason in lost.items():
                landing.on_lost(reason)

    def _landed(self, fetched: Fetched, wanted: Wanted) -> Arrived | str | None:
        """Lands a block; None when nobody wants it any more, the reason when its handoff is lost over it."""
        block, started = wanted.block, time.monotonic()
        try:
            if not self._land(fetched, wanted):
                return None
        except CodecError as error:
            return f"block {block.seq}: {error}"
        except Exception as error:
            log.exception("%s: cannot write layer %d", block.request_id, block.layer)
            return f"cannot write: {error}"
        now, fetch_s = time.monotonic(), fetched.share_s(wanted)
        return Arrived(block.seq, block.nbytes, fetched.fetched_at, now, fetch_s + now - started, fetch_s)

    def _land(self, fetched: Fetched, wanted: Wanted) -> bool:
        """False when nobody wants the block any more. Raises :class:`CodecError`."""
        block, landing = wanted.block, wanted.landing
        data = self._pool.memory.view(fetched.place(wanted), block.nbytes)
        digest = block_digest(
            data, request_id=block.request_id, epoch=block.epoch, layout=fetched.wire.fingerprint,
            layer=block.layer, start=block.start, count=block.count, codec=block.codec, key=self._key,
        )  # fmt: skip
        if digest != block.digest:
            raise CodecError("digest mismatch")
        write = self._writer(fetched.wire, wanted, data)
        if not landing.gate.enter():
            return False
        try:
            write()
        finally:
            landing.gate.leave()
        return True

    def _writer(self, wire: KVLayout, wanted: Wanted, data: memoryview) -> Callable[[], None]:
        """What puts a block into its request's pages; decoded before, where its codec does not know pages."""
        block, write = wanted.block, wanted.landing.write
        paged = self._paged.get(block.codec) if wire.dtype == self._layout.dtype else None
        if isinstance(write, Paged) and paged is not None:
            return partial(_decode_there, paged, write, block, data)
        decoded = self._codecs[wire.dtype, block.codec].decode(data, block.count)
        keys, values = (half.to(self._dtype) for half in decoded)
        if isinstance(write, Paged):
            return lambda: write.locate(block.layer, block.start, block.count).scatter(keys, values)
        return partial(write, block.layer, block.start, keys, values)


def _decode_there(codec: PagedCodec, pages: Paged, block: Block, data: memoryview) -> None:
    rows = pages.locate(block.layer, block.start, block.count)
    codec.decode(data, rows.layer, rows.slots)


class Puller:
    """Fetches one peer's blocks, in order."""

    def __init__(
        self, source: Source, pool: BufferPool, lander: Lander, wire: KVLayout,
        *, most_bytes: int, stall_s: float, on_broken: Callable[[str], object], name: str,
    ) -> None:  # fmt: skip
        """``most_bytes``: of one fetch; at least the largest block's."""
        self._source, self._pool, self._lander, self._wire = source, pool, lander, wire
        self._most_bytes, self._stall_s = most_bytes, stall_s
        self._on_broken = on_broken
        self._wanted: queue.SimpleQueue[Wanted | None] = queue.SimpleQueue()
        self._behind: Wanted | None = None  # taken from the queue, and not part of the run before it
        self._stopped = False
        self._unended: list[Callable[[], bool]] = []
        self._thread = threading.Thread(target=self._run, name=f"kv-pull-{name}", daemon=True)
        self._thread.start()

    def pull(self, block: Block, landing: Landing) -> None:
        self._wanted.put(Wanted(block, landing))

    def carrier(self) -> str:
        """What carries the bytes, as the transport itself says."""
        return self._source.carrier()

    def stop(self) -> None:
        """Gives up the fetch under way and every queued one."""
        self._stopped = True
        self._source.interrupt()
        self._wanted.put(None)

    def retire(self) -> bool:
        """After ``stop``: True once nothing of this peer can write any more, and its source is closed."""
        if self._thread.is_alive():
            return False
        self._unended = [ended for ended in self._unended if not ended()]
        if self._unended:
            return False
        self._source.close()
        return True

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while (first := self._next()) is not None:
                if not self._stopped and not first.landing.gate.closed:
                    self._pull(self._run_from(first))
        except Exception as error:
            log.exception("pulling from a peer failed")
            self._stopped = True
            self._on_broken(f"cannot pull: {error}")

    def _next(self) -> Wanted | None:
        behind, self._behind = self._behind, None
        return behind or self._wanted.get()

    def _run_from(self, first: Wanted) -> tuple[Wanted, ...]:
        """``first``, and what was announced by now that lies behind it in the peer's memory, within one fetch."""
        run, start = [first], first.block.offset
        with contextlib.suppress(queue.Empty):
            while len(run) < MOST_TOGETHER:
                wanted = self._wanted.get_nowait()
                if wanted is None:
                    self._wanted.put(None)  # for ``_next``: nothing follows it
                    break
                block, last = wanted.block, run[-1].block
                beside = block.offset == aligned(last.offset + last.nbytes)
                if not beside or block.offset + block.nbytes - start > self._most_bytes or wanted.landing.gate.closed:
                    self._behind = wanted
                    return tuple(run)
                run.append(wanted)
        return tuple(run)

    def _pull(self, run: tuple[Wanted, ...]) -> None:
        start, last = run[0].block.offset, run[-1].block
        nbytes = last.offset + last.nbytes - start
        region = self._pool.take(nbytes, timeout_s=self._stall_s)
        if region is None:
            for wanted in run:
                wanted.landing.fail(f"no landing buffer became free within {self._stall_s:g} s")
            return
        started = time.monotonic()
        try:
            self._source.fetch(start, nbytes, region.offset, self._stall_s)
        except FetchLost as error:
            self._give_up(region, error)
            return
        now = time.monotonic()
        self._lander.put(Fetched(run, self._wire, region, now - started, now))

    def _give_up(self, region: Region, error: FetchLost) -> None:
        if error.ended is None:
            self._pool.give(region)
        else:
            self._unended.append(error.ended)
            self._pool.quarantine(region, error.ended)
        self._stopped = True
        self._on_broken(str(error))
