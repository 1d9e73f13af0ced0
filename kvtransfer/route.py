"""What a sender knows of the way to one receiver, and the codec it picks there.

Not pure: it remembers. Whoever shares one between threads guards it with a lock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from baton.errors import ProtocolError
from kvtransfer.chooser import NOTHING, Ahead, Candidate, Ends, Link, Load, Speed, pick
from kvtransfer.link_meter import LinkMeter, WorkMeter
from kvtransfer.processor import cores
from kvtransfer.protocol import Ack, Welcome

_SHARE = 1 / 8  # of the newest parcel in what is known of a codec
_EVERY = 8  # parcels: then the other codecs' candidates follow
_FORGET = 1 / 32  # each time, of what only other codecs' parcels can tell by now
_MOVED = 0.02  # by which a ratio or an encoding time has to change to be told
_CHOSEN_FOR = 4  # blocks: choosing takes up to half as long as copying one
_MOST_BEYOND_S = 5e-3  # that one block may show: a thread that lost its core for longer says nothing of the next


class Ratios:
    """What each codec is really like at this worker, whoever blocks were for: how much it shrinks them, and what one
    takes the encoder beyond what was measured at start-up.

    A codec that nobody has used lately is taken to go beyond as little as the one that does least: threads on the same
    core slow every codec down, and one that was measured at a bad moment must be tried again.
    """

    def __init__(self, measured: Sequence[Candidate], sending: Callable[[], Speed | None] = lambda: None) -> None:
        """``sending``: what serving fetches takes, as :meth:`kvtransfer.transports.Exporter.sending` says it."""
        self.sending = sending
        self.candidates = {one.name: one for one in measured}
        self._measured = {one.name: one for one in measured}
        self._ratios = {one.name: one.ratio for one in measured}
        self._beyond_s: dict[str, float] = {}  # a block, by codecs that were used
        self._parcels = 0

    def encode_s(self, codec: str, raw_bytes: int) -> float:
        """What one block should take by its codec alone; 0 where that was not measured."""
        known = self._measured.get(codec)
        return known.encode.seconds(1, raw_bytes) if known is not None else 0.0

    def encoded(self, codec: str, blocks: int, raw_bytes: int, nbytes: int, cpu_s: float) -> None:
        """One parcel of so many blocks took the encoder's thread ``cpu_s`` to gather, encode and sign."""
        measured = self._measured.get(codec)
        if measured is None:
            return
        self._ratios[codec] += _SHARE * (raw_bytes / nbytes - self._ratios[codec])
        beyond_s = min(_MOST_BEYOND_S, max(0.0, cpu_s - measured.encode.seconds(blocks, raw_bytes)) / blocks)
        least_s = min(self._beyond_s.values(), default=0.0)
        before_s = self._beyond_s.get(codec, least_s)
        self._beyond_s[codec] = before_s + _SHARE * (beyond_s - before_s)
        self._parcels += 1
        if self._parcels % _EVERY:
            self._tell(codec, least_s, raw_bytes / blocks)
            return
        for other in self._beyond_s:
            self._beyond_s[other] += _FORGET * (least_s - self._beyond_s[other])
        for name in self.candidates:
            self._tell(name, least_s, raw_bytes / blocks)

    def _tell(self, name: str, least_s: float, block_bytes: float) -> None:
        """Renews the candidate ``name`` when what is known of it has moved."""
        told, measured = self.candidates[name], self._measured[name]
        work_s = block_bytes / measured.encode.bytes_per_s
        block_s = measured.encode.block_s + self._beyond_s.get(name, least_s)
        moved_s = abs(block_s - told.encode.block_s)
        ratio = self._ratios[name]
        if moved_s > _MOVED * (work_s + block_s) or abs(ratio - told.ratio) > _MOVED * told.ratio:
            self.candidates[name] = replace(told, ratio=ratio, encode=replace(measured.encode, block_s=block_s))


class Route:
    """To one receiver. ``ratios`` are shared by all routes of a sender."""

    def __init__(self, ratios: Ratios) -> None:
        self._ratios = ratios
        self._meter, self._fetching = LinkMeter(), WorkMeter()
        self._cores, self._cores_there = cores(), math.inf
        self._decode: dict[str, Speed] = {}  # empty: as fast as this machine
        self._seen: dict[str, tuple[Candidate, Candidate]] = {}  # as measured here, and with the receiver's speed
        self._landing = 1
        self._last: tuple[tuple[str, ...], int, str | None] = ((), 0, None)
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
        self._cores_there = welcome.cores if welcome.cores > 0.0 else math.inf
        self._seen.clear()
        if welcome.probe is not None:
            self._meter.probed(Link(welcome.probe.bytes_per_s, welcome.probe.latency_s))

    def acknowledged(self, ack: Ack, nbytes: int) -> None:
        """A parcel of ``nbytes`` has landed there."""
        self._landing = max(1, ack.landing)
        self._meter.fetched(nbytes, ack.fetch_s)
        self._fetching.took(nbytes, ack.fetch_cpu_s)

    def pick(self, allowed: tuple[str, ...], ahead: Ahead, load: Load) -> str | None:
        """The codec for the next blocks; None when none of ``allowed`` was measured at both ends.

        The last choice holds for a few blocks of the handoff that brings the same ``allowed``.
        """
        before, blocks, name = self._last
        if before is allowed and 0 <= blocks - ahead.blocks < _CHOSEN_FOR:
            return name
        chosen = self._pick(allowed, ahead, load)
        self._last = (allowed, ahead.blocks, chosen)
        return chosen

    def _pick(self, allowed: tuple[str, ...], ahead: Ahead, load: Load) -> str | None:
        candidates = [
            self._there(one)
            for name, one in self._ratios.candidates.items()
            if name in allowed and (not self._decode or name in self._decode)
        ]
        if not candidates:
            return None
        return pick(candidates, self.link, ahead, replace(load, decode=self._landing), ends=self._ends()).name

    def _ends(self) -> Ends:
        sending, fetching = self._ratios.sending(), self._fetching.cost()
        return Ends(sending or NOTHING, fetching or NOTHING, self._cores, self._cores_there)

    def _there(self, candidate: Candidate) -> Candidate:
        if not self._decode:
            return candidate
        seen = self._seen.get(candidate.name)
        if seen is None or seen[0] is not candidate:
            there = replace(candidate, decode=self._decode[candidate.name])
            seen = self._seen[candidate.name] = (candidate, there)
        return seen[1]
