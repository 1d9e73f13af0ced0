"""What a sender knows of the way to one receiver, and the codec it picks there.

Not pure: it remembers. Whoever shares one between threads guards it with a lock.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from baton.errors import ProtocolError
from kvtransfer.chooser import Ahead, Candidate, Link, Load, Speed, pick
from kvtransfer.link_meter import LinkMeter
from kvtransfer.protocol import Ack, Welcome

_RATIO_SHARE = 1 / 8  # of the newest block in a codec's running ratio
_RATIO_MOVED = 0.01
_OVERHEAD_SHARE = 1 / 16  # of the newest block in the running overhead
_MOST_OVERHEAD_S = 5e-3  # that one block may show: a thread that lost its core for longer says nothing of the next


class Ratios:
    """How much each codec really shrank this worker's blocks, whoever they were for, and what encoding them took beside
    what was measured of their codecs at start-up."""

    def __init__(self, measured: Sequence[Candidate]) -> None:
        self.candidates = {one.name: one for one in measured}
        self._running = {one.name: one.ratio for one in measured}
        self.overhead_s = 0.0  # a block

    def encode_s(self, codec: str, raw_bytes: int) -> float:
        """What one block should take; 0 where that was not measured."""
        known = self.candidates.get(codec)
        return known.encode.seconds(1, raw_bytes) if known is not None else 0.0

    def encoded(self, codec: str, blocks: int, raw_bytes: int, nbytes: int, work_s: float) -> None:
        """One parcel of so many blocks took ``work_s`` to gather, encode and sign."""
        known = self.candidates.get(codec)
        if known is None:
            return
        beyond_s = min(_MOST_OVERHEAD_S, max(0.0, work_s - known.encode.seconds(blocks, raw_bytes)) / blocks)
        self.overhead_s += _OVERHEAD_SHARE * (beyond_s - self.overhead_s)
        running = self._running[codec] = self._running[codec] + _RATIO_SHARE * (
            raw_bytes / nbytes - self._running[codec]
        )
        if abs(running - known.ratio) > _RATIO_MOVED * known.ratio:
            self.candidates[codec] = replace(known, ratio=running)


class Route:
    """To one receiver. ``ratios`` are shared by all routes of a sender."""

    def __init__(self, ratios: Ratios) -> None:
        self._ratios = ratios
        self._meter = LinkMeter()
        self._decode: dict[str, Speed] = {}  # empty: as fast as this machine
        self._seen: dict[str, tuple[Candidate, Candidate]] = {}  # as measured here, and with the receiver's speed
        self._landing = 1
        self.parcel_bytes = 0  # as the receiver said

    @property
    def link(self) -> Link:
        return self._meter.link()

    def welcomed(self, welcome: Welcome) -> None:
        """The receiver's speeds and its probe of the link. Raises :class:`ProtocolError` for ones that cannot be."""
        speeds = {one.codec: Speed(one.block_s, one.bytes_per_s) for one in welcome.decode}
        said = [(one.block_s, one.bytes_per_s) for one in speeds.values()]
        if welcome.probe is not None:
            said.append((welcome.probe.latency_s, welcome.probe.bytes_per_s))
        for start_s, bytes_per_s in said:
            if not (0.0 <= start_s < math.inf and 0.0 < bytes_per_s < math.inf):
                raise ProtocolError(f"Welcome: {start_s} s and {bytes_per_s} bytes per second")
        self._decode, self.parcel_bytes = speeds, welcome.parcel_bytes
        self._seen.clear()
        if welcome.probe is not None:
            self._meter.probed(Link(welcome.probe.bytes_per_s, welcome.probe.latency_s))

    def acknowledged(self, ack: Ack, nbytes: int) -> None:
        """A parcel of ``nbytes`` has landed there."""
        self._landing = max(1, ack.landing)
        self._meter.fetched(nbytes, ack.fetch_s)

    def pick(self, allowed: Collection[str], ahead: Ahead, load: Load) -> str | None:
        """The codec for one block; None when none of ``allowed`` was measured at both ends."""
        candidates = [
            self._there(one)
            for name, one in self._ratios.candidates.items()
            if name in allowed and (not self._decode or name in self._decode)
        ]
        if not candidates:
            return None
        ahead = replace(ahead, overhead_s=self._ratios.overhead_s)
        return pick(candidates, self._meter.link(), ahead, replace(load, decode=self._landing)).name

    def _there(self, candidate: Candidate) -> Candidate:
        if not self._decode:
            return candidate
        seen = self._seen.get(candidate.name)
        if seen is None or seen[0] is not candidate:
            there = replace(candidate, decode=self._decode[candidate.name])
            seen = self._seen[candidate.name] = (candidate, there)
        return seen[1]
