"""The stage ledger: where a request's time went, in an order that sums to what the client saw.

    arrive ──admit──► dispatched ──queue──► computing ──prefill──► first token
           ──encode──► staged ──wire──► fetched ──land──► landed ──wait──► first step ──decode──► last token

Transfer work that ran while prefill was still computing is hidden and costs the client nothing, so ``encode``,
``wire`` and ``land`` hold only the exposed part; the whole of it is reported beside them as ``transfer_busy_s``.
``recover`` is what the failure of a worker cost: from the last token before it to the beginning of the next attempt.
What no stage explains (frames in flight, scheduling of processes) is ``deliver``: a remainder, never hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

STAGES = ("admit", "queue", "prefill", "encode", "wire", "land", "wait", "decode", "recover", "deliver")


@dataclass(frozen=True, slots=True)
class Ledger:
    """Seconds per stage; ``sum(stages.values()) == total_s`` up to float rounding."""

    total_s: float
    stages: Mapping[str, float] = field(default_factory=dict)
    transfer_busy_s: float = 0.0  # encode + wire + land work, hidden or not
    transfer_bytes: int = 0  # encoded bytes that crossed the wire
    codec: str = ""  # see :func:`blend`
    transport: str = ""

    @property
    def transfer_exposed_s(self) -> float:
        """The part of the handoff that the client waited for, in seconds."""
        return sum(self.stages.get(name, 0.0) for name in ("encode", "wire", "land"))

    @property
    def transfer_hidden_share(self) -> float:
        """Share of the transfer work that overlapped prefill, in [0, 1]; 1 when nothing was transferred."""
        if self.transfer_busy_s <= 0.0:
            return 1.0
        return min(1.0, max(0.0, 1.0 - self.transfer_exposed_s / self.transfer_busy_s))


def blend(codec_tokens: Mapping[str, int]) -> str:
    """The codecs that carried a handoff: "raw", or with their shares, "int8-zstd 60 %, raw 40 %"; "" for none."""
    if len(codec_tokens) <= 1:
        return "".join(codec_tokens)
    total = max(1, sum(codec_tokens.values()))
    by_share = sorted(codec_tokens.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{codec} {100 * tokens / total:.0f} %" for codec, tokens in by_share)


def close(total_s: float, measured: Mapping[str, float]) -> dict[str, float]:
    """Every stage in order, with ``deliver`` as the remainder so that the values sum to ``total_s``.

    Stages are measured by different processes; when their sum exceeds the total (an overlap the ledger does not
    model), the remainder is zero and the stages are scaled to fit, so that the sum stays true.
    """
    stages = {name: max(0.0, measured.get(name, 0.0)) for name in STAGES if name != "deliver"}
    explained = sum(stages.values())
    if explained > total_s > 0.0:
        stages = {name: seconds * total_s / explained for name, seconds in stages.items()}
        explained = total_s
    return stages | {"deliver": max(0.0, total_s - explained)}
