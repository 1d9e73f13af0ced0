"""Which codec blocks cross in, decided purely: measured speeds go in, a choice comes out that carries its reasons.

    V    raw bytes still to go, in n blocks     r      a codec's compression ratio
    E    seconds to encode all of them          B, l   the link's bytes per second, and seconds per fetch
    D    seconds to decode and write them       K      bytes encoded before and not fetched yet
    P    seconds until prefill is done          m      fetches
    S    processor seconds to send them         c      processors of the sending process
    F    processor seconds to fetch them        d      processors of the receiving process
    s, f of those, for each byte on the wire    W = m l + V / (r B)

Blocks that are encoded within A seconds share a fetch where they wait for the encoder, which is where E is more than P;
where prefill is slower, each is encoded as it comes and fetched alone. Encode, wire and decode run at once, each on the
blocks of one fetch, and prefill runs beside them. Where an end has processors enough its stages do not disturb each
other; where it has few, what it has to do in all takes it that long. From now the last block has landed after

    T = (E + W + D) / m + max(P, (1 - 1/m) E, K/B + (1 - 1/m) W, (1 - 1/m) D, X, Y)
    X = ((1 - 1/m) (E + S) + K s) / c           Y = ((1 - 1/m) (D + F) + K f) / d

of which T - P is exposed: what the slowest stage or the busiest end falls behind prefill, and the last fetch's own way
through all three stages. A codec pays where it makes T smaller, and raw wins where the link is not what everything
waits for. Stages are multiplied by the handoffs that share the encoder (E, S), the link (W) and the decoder (D, F).

The choice minimises ``(1 + STEP_PRICE * loss) T`` over the codecs that land within the slack; where none does, T. Raw
is always a candidate and has no price, so that by this model no choice is slower than raw. Of two codecs whose fetches
are alike, the one that compresses more and is more work for encoder, decoder and either end wins on every link slower
than one on which it wins, unless it is the less lossy one (docs/adr/0009-codec-chooser.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtransfer.protocol import MOST_BLOCKS

STEP_PRICE = 0.01  # each step down the quality floors has to save this share of the time
SLOWEST, FASTEST = 1e4, 1e13  # bytes per second between which break-evens are looked for
_STEPS_PER_DECADE = 20
_BISECTIONS = 40


@dataclass(frozen=True, slots=True)
class Speed:
    """One stage's seconds: ``block_s`` for each block whatever its size, and ``bytes_per_s`` of raw KV."""

    block_s: float
    bytes_per_s: float

    def seconds(self, blocks: int, nbytes: int) -> float:
        return blocks * self.block_s + nbytes / self.bytes_per_s


NOTHING = Speed(0.0, math.inf)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A codec as measured. ``loss``: how far down the quality floors it lies (``baton.config_handoff.LOSS``)."""

    name: str
    ratio: float
    encode: Speed
    decode: Speed
    loss: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    bytes_per_s: float
    latency_s: float  # of one fetch, whatever its size


@dataclass(frozen=True, slots=True)
class Ahead:
    """What one handoff still has to do, from the block in hand to its last."""

    raw_bytes: int
    blocks: int
    backlog_bytes: int = 0  # encoded for the same receiver, not fetched yet
    prefill_s: float = 0.0  # until the last block is computed
    slack_s: float = math.inf  # until the deadline
    together_s: float = 0.0  # A: blocks that wait for the encoder and are encoded within it are fetched at once


@dataclass(frozen=True, slots=True)
class Load:
    """Handoffs that share each stage, this one included."""

    encode: int = 1
    wire: int = 1
    decode: int = 1


@dataclass(frozen=True, slots=True)
class Ends:
    """What moving wire bytes takes the processes at both ends, and how many processors they have."""

    send: Speed = NOTHING  # s: processor seconds for each fetch, and wire bytes in a processor second
    fetch: Speed = NOTHING  # f
    sender_cores: float = math.inf
    receiver_cores: float = math.inf


ALONE = Load()
ENOUGH = Ends()


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one codec would cost. ``total_s`` is T above; the stages are whole, as is what either end's processors do;
    ``score`` is what is minimised."""

    codec: Candidate
    encode_s: float
    wire_s: float
    decode_s: float
    sender_s: float  # (E + S) / c
    receiver_s: float  # (D + F) / d
    total_s: float
    exposed_s: float
    score: float

    @property
    def bottleneck(self) -> str:
        """The stage that takes longest, or the end that has too few processors for all of its own."""
        stages = {
            "encode": self.encode_s, "wire": self.wire_s, "decode": self.decode_s,
            "work of the sender": self.sender_s, "work of the receiver": self.receiver_s,
        }  # fmt: skip
        return max(stages, key=stages.__getitem__)


@dataclass(frozen=True, slots=True)
class Choice:
    """``estimates`` are in the candidates' order."""

    best: Estimate
    estimates: tuple[Estimate, ...]
    slack_s: float

    @property
    def codec(self) -> str:
        return self.best.codec.name

    def why(self) -> str:
        """One sentence with the numbers that decided."""
        best = self.best
        text = f"{self.codec} exposes {_ms(best.exposed_s)}, most of it {best.bottleneck}"
        others = [other for other in self.estimates if other is not best]
        if others:
            next_best = min(others, key=lambda other: other.score)
            text += f"; next is {next_best.codec.name} with {_ms(next_best.exposed_s)}, {self._held_back(next_best)}"
        if best.total_s > self.slack_s:
            text += f"; the deadline in {_ms(self.slack_s)} is out of reach"
        return text

    def _held_back(self, other: Estimate) -> str:
        """What speaks against ``other``."""
        if other.total_s > self.slack_s >= self.best.total_s:
            return "which misses the deadline"
        if other.exposed_s <= self.best.exposed_s:
            return "too little gained for its loss"
        return f"most of it {other.bottleneck}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _stages(codec: Candidate, link: Link, ahead: Ahead, load: Load, ends: Ends) -> tuple[float, ...]:
    """The module's formula for one codec: E, W, D, X and Y without what was encoded before, and T.

    No calls but built-in ones: it runs for every codec and choice.
    """
    n, raw, queued = ahead.blocks, ahead.raw_bytes, ahead.backlog_bytes
    encode, decode, send, fetch = codec.encode, codec.decode, ends.send, ends.fetch
    wire = raw / codec.ratio
    encode_s = n * encode.block_s + raw / encode.bytes_per_s
    together = 1
    if load.encode * encode_s > ahead.prefill_s:
        together = int(min(MOST_BLOCKS, max(1.0, ahead.together_s * n / encode_s)))
    fetches = -(-n // together)
    decode_s = n * decode.block_s + raw / decode.bytes_per_s
    sender_s = load.encode * (encode_s + fetches * send.block_s + wire / send.bytes_per_s) / ends.sender_cores
    receiver_s = load.decode * (decode_s + fetches * fetch.block_s + wire / fetch.bytes_per_s) / ends.receiver_cores
    encode_s *= load.encode
    decode_s *= load.decode
    wire_s = load.wire * (fetches * link.latency_s + wire / link.bytes_per_s)
    but_one = 1 - 1 / fetches
    behind_s = max(
        ahead.prefill_s,
        but_one * encode_s,
        queued / link.bytes_per_s + but_one * wire_s,
        but_one * decode_s,
        but_one * sender_s + queued / (send.bytes_per_s * ends.sender_cores),
        but_one * receiver_s + queued / (fetch.bytes_per_s * ends.receiver_cores),
    )
    total_s = (encode_s + wire_s + decode_s) / fetches + behind_s
    return encode_s, wire_s, decode_s, sender_s, receiver_s, total_s


def _score(codec: Candidate, total_s: float) -> float:
    return (1 + STEP_PRICE * codec.loss) * total_s


def estimate(codec: Candidate, link: Link, ahead: Ahead, load: Load, *, ends: Ends = ENOUGH) -> Estimate:
    """What ``codec`` would cost."""
    encode_s, wire_s, decode_s, sender_s, receiver_s, total_s = _stages(codec, link, ahead, load, ends)
    exposed_s = total_s - ahead.prefill_s
    return Estimate(
        codec, encode_s, wire_s, decode_s, sender_s, receiver_s, total_s, exposed_s, _score(codec, total_s)
    )  # fmt: skip


def pick(
    candidates: Sequence[Candidate], link: Link, ahead: Ahead, load: Load = ALONE, *, ends: Ends = ENOUGH
) -> Candidate:
    """The codec for the block in hand. ``candidates``: all that are allowed, at least one; ahead.blocks at least 1.

    It runs on the encoder's thread, so it keeps no estimates: :func:`choose` does.
    """
    totals = [_stages(codec, link, ahead, load, ends)[-1] for codec in candidates]
    in_time = [at for at, total_s in enumerate(totals) if total_s <= ahead.slack_s]
    if not in_time:
        return candidates[min(range(len(totals)), key=totals.__getitem__)]
    return candidates[min(in_time, key=lambda at: _score(candidates[at], totals[at]))]


def choose(
    candidates: Sequence[Candidate], link: Link, ahead: Ahead, load: Load = ALONE, *, ends: Ends = ENOUGH
) -> Choice:
    """What :func:`pick` picks, and why."""
    at = candidates.index(pick(candidates, link, ahead, load, ends=ends))
    estimates = tuple(estimate(codec, link, ahead, load, ends=ends) for codec in candidates)
    return Choice(estimates[at], estimates, ahead.slack_s)


@dataclass(frozen=True, slots=True)
class Regime:
    """``codec`` is chosen on links of up to ``below_bytes_per_s``, from where the regime before it ends."""

    codec: str
    below_bytes_per_s: float


def regimes(
    candidates: Sequence[Candidate], latency_s: float, ahead: Ahead, load: Load = ALONE, *, ends: Ends = ENOUGH
) -> list[Regime]:
    """Which codec is chosen at which bandwidth, slowest first; the last one reaches to infinity."""

    def picked(bytes_per_s: float) -> str:
        return pick(candidates, Link(bytes_per_s, latency_s), ahead, load, ends=ends).name

    decades = math.log10(FASTEST / SLOWEST)
    grid = [SLOWEST * 10 ** (at / _STEPS_PER_DECADE) for at in range(round(decades * _STEPS_PER_DECADE) + 1)]
    picks = [picked(at) for at in grid]
    found = [
        Regime(before, _edge(before, picked, slow, fast))
        for before, after, slow, fast in zip(picks, picks[1:], grid, grid[1:], strict=False)
        if before != after
    ]
    return [*found, Regime(picks[-1], math.inf)]


def pays_below(
    codec: Candidate, raw: Candidate, latency_s: float, ahead: Ahead, load: Load = ALONE, *, ends: Ends = ENOUGH
) -> float:
    """Bytes per second below which ``codec`` lands sooner than ``raw``: 0 for never, infinity for always."""

    def faster(bytes_per_s: float) -> str:
        link = Link(bytes_per_s, latency_s)
        codec_s, raw_s = (estimate(one, link, ahead, load, ends=ends).total_s for one in (codec, raw))
        return codec.name if codec_s < raw_s else raw.name

    if faster(SLOWEST) == raw.name:
        return 0.0
    return math.inf if faster(FASTEST) == codec.name else _edge(codec.name, faster, SLOWEST, FASTEST)


def _edge(name: str, pick: Callable[[float], str], slow: float, fast: float) -> float:
    """The bandwidth above ``slow``, and below ``fast``, at which ``pick`` stops saying ``name``."""
    for _ in range(_BISECTIONS):
        middle = math.sqrt(slow * fast)
        slow, fast = (middle, fast) if pick(middle) == name else (slow, middle)
    return slow
