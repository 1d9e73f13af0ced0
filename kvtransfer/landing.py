"""The receiver's threads: one per peer pulls announced parcels into landing buffers, one for all verifies, decodes and
writes them. No thread of one stopped peer delays another peer's parcels, and decoding takes one core at most.

A parcel is fetched and acknowledged as a whole: its blocks share what a fetch, a hand-over between threads and a
message cost (docs/handoff.md). Each block is verified, and then written, while it is in the core's cache.
"""

from __future__ import annotations

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
from kvtransfer.arena import BufferPool, Region
from kvtransfer.codecs import CodecError, make_codec
from kvtransfer.codecs.block import TORCH_DTYPES
from kvtransfer.codecs.paged import PagedCodec
from kvtransfer.handoff import Arrived
from kvtransfer.link_probe import Spent, timed_fetch
from kvtransfer.pages import Accelerator, Paged, lane_of, paged_codecs
from kvtransfer.protocol import Block, Parcel, block_digest
from kvtransfer.signing import BlockKey
from kvtransfer.transports import FetchLost, Source

log = logging.getLogger(__name__)

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
    """Where one handoff's parcels go. The callbacks are called on the landing threads."""

    gate: Gate
    write: Write
    on_arrived: Callable[[Arrived], None]
    on_lost: Callable[[str], None]

    def fail(self, reason: str) -> None:
        """Loses the handoff; its next parcel is not written even if that is at hand already."""
        self.gate.close()
        self.on_lost(reason)


@dataclass(frozen=True, slots=True)
class Wanted:
    """An announced parcel, and where it goes."""

    parcel: Parcel
    landing: Landing


@dataclass(frozen=True, slots=True)
class Fetched:
    """A parcel in ``region`` of landing memory."""

    wanted: Wanted
    wire: KVLayout  # as the sender encoded it
    region: Region
    spent: Spent
    fetched_at: float


class Lander:
    """Verifies fetched parcels, decodes them, and writes them in the dtype of ``layout``, whatever their sender's.

    Blocks in the pages' dtype, in a codec that knows pages, are decoded straight into those that their request says.
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
        self._fingerprints = {dtype: replace(layout, dtype=dtype).fingerprint for dtype in DTYPES}
        # Short: what was fetched long before it is landed has left the cache, and no link is faster than landing.
        self._fetched: queue.Queue[Fetched | None] = queue.Queue(maxsize=1)
        self.landed = 0  # blocks
        self._thread = threading.Thread(target=self._run, name="kv-land", daemon=True)
        self._thread.start()

    def put(self, fetched: Fetched) -> None:
        """Waits until the one before has begun to land."""
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
            landing, landed = fetched.wanted.landing, self._landed(fetched)
            self._pool.give(fetched.region)  # before anybody learns what became of the parcel
            match landed:
                case Arrived():
                    landing.on_arrived(landed)
                case str():
                    landing.fail(landed)

    def _landed(self, fetched: Fetched) -> Arrived | str | None:
        """Lands a parcel; None when nobody wants it any more, the reason when its handoff is lost over it."""
        parcel, started = fetched.wanted.parcel, time.monotonic()
        try:
            if not self._land(fetched):
                return None
        except CodecError as error:
            return f"parcel {parcel.seq}: {error}"
        except Exception as error:
            log.exception("%s: cannot write parcel %d", parcel.request_id, parcel.seq)
            return f"cannot write: {error}"
        now = time.monotonic()
        spent = fetched.spent
        work_s = spent.wall_s + now - started
        return Arrived(parcel.seq, parcel.nbytes, fetched.fetched_at, now, work_s, spent.link_s, spent.cpu_s)

    def _land(self, fetched: Fetched) -> bool:
        """False when nobody wants the parcel any more. Raises :class:`CodecError`."""
        parcel, landing = fetched.wanted.parcel, fetched.wanted.landing
        for block, at in parcel.places():
            data = self._pool.memory.view(fetched.region.offset + at, block.nbytes)
            digest = block_digest(
                data, request_id=parcel.request_id, epoch=parcel.epoch, layout=self._fingerprints[fetched.wire.dtype],
                layer=block.layer, start=block.start, count=block.count, codec=parcel.codec, key=self._key,
            )  # fmt: skip
            if digest != block.digest:
                raise CodecError("digest mismatch")
            write = self._writer(fetched.wire, parcel.codec, landing.write, block, data)
            if not landing.gate.enter():
                return False
            try:
                write()
            finally:
                landing.gate.leave()
            self.landed += 1
        return True

    def _writer(self, wire: KVLayout, codec: str, write: Write, block: Block, data: memoryview) -> Callable[[], None]:
        """What puts a block into its request's pages; decoded before, where its codec does not know pages."""
        paged = self._paged.get(codec) if wire.dtype == self._layout.dtype else None
        if isinstance(write, Paged) and paged is not None:
            return partial(_decode_there, paged, write, block, data)
        decoded = self._codecs[wire.dtype, codec].decode(data, block.count)
        keys, values = (half.to(self._dtype) for half in decoded)
        if isinstance(write, Paged):
            return lambda: write.locate(block.layer, block.start, block.count).scatter(keys, values)
        return partial(write, block.layer, block.start, keys, values)


def _decode_there(codec: PagedCodec, pages: Paged, block: Block, data: memoryview) -> None:
    rows = pages.locate(block.layer, block.start, block.count)
    codec.decode(data, rows.layer, rows.slots)


class Puller:
    """Fetches one peer's parcels, in order."""

    def __init__(
        self, source: Source, pool: BufferPool, lander: Lander, wire: KVLayout,
        *, stall_s: float, on_broken: Callable[[str], object], name: str,
    ) -> None:  # fmt: skip
        self._source, self._pool, self._lander, self._wire = source, pool, lander, wire
        self._stall_s, self._on_broken = stall_s, on_broken
        self._wanted: queue.SimpleQueue[Wanted | None] = queue.SimpleQueue()
        self._stopped = False
        self._unended: list[Callable[[], bool]] = []
        self._thread = threading.Thread(target=self._run, name=f"kv-pull-{name}", daemon=True)
        self._thread.start()

    def pull(self, parcel: Parcel, landing: Landing) -> None:
        self._wanted.put(Wanted(parcel, landing))

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
            while (wanted := self._wanted.get()) is not None:
                if not self._stopped and not wanted.landing.gate.closed:
                    self._pull(wanted)
        except Exception as error:
            log.exception("pulling from a peer failed")
            self._stopped = True
            self._on_broken(f"cannot pull: {error}")

    def _pull(self, wanted: Wanted) -> None:
        nbytes = wanted.parcel.nbytes
        region = self._pool.take(nbytes, timeout_s=self._stall_s)
        if region is None:
            wanted.landing.fail(f"no landing buffer became free within {self._stall_s:g} s")
            return
        try:
            spent = timed_fetch(self._source, wanted.parcel.offset, nbytes, region.offset, self._stall_s)
        except FetchLost as error:
            self._give_up(region, error)
            return
        self._lander.put(Fetched(wanted, self._wire, region, spent, time.monotonic()))

    def _give_up(self, region: Region, error: FetchLost) -> None:
        if error.ended is None:
            self._pool.give(region)
        else:
            self._unended.append(error.ended)
            self._pool.quarantine(region, error.ended)
        self._stopped = True
        self._on_broken(str(error))
