"""What the handoff of one prompt's KV costs, apart and behind prefill.

    b    bytes of one token's KV            n    prompt tokens           L    layers
    e    raw bytes encoded per second       d    raw bytes decoded and landed per second
    w    wire bytes per second              r    compression ratio       a    seconds before the first byte moves
    oe, ow, od    seconds that a layer costs in each stage whatever its size (calls, digests, one round trip)

With V = n b bytes, the three stages take

    T_e = L oe + V/e      T_w = L ow + V/(r w)      T_d = L od + V/d      and T = a + T_e + T_w + T_d

when nothing overlaps. Layers leave while the next one computes, so each stage sees L pieces, one every P/L seconds,
where P is the prefill's time. The slowest stage, m = max(T_e, T_w, T_d), falls behind by (m - P)(1 - 1/L) if it is
slower than prefill; the last layer then still passes all three:

    T_exposed = a + (T_e + T_w + T_d)/L + max(0, m - P)(1 - 1/L)   <=  T
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from baton.errors import ConfigError
from kvtransfer import chooser


@dataclass(frozen=True, slots=True)
class HandoffCost:
    """The symbols above; ``math.inf`` for a stage that takes no time of its own (raw KV on a GPU)."""

    token_bytes: int
    layers: int
    wire_bytes_per_s: float
    encode_bytes_per_s: float = math.inf
    decode_bytes_per_s: float = math.inf
    ratio: float = 1.0
    latency_s: float = 0.0
    encode_layer_s: float = 0.0
    wire_layer_s: float = 0.0
    decode_layer_s: float = 0.0

    def __post_init__(self) -> None:
        for key in ("wire_bytes_per_s", "encode_bytes_per_s", "decode_bytes_per_s", "ratio", "layers"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"is {getattr(self, key)}, expected more than 0", field=f"handoff.{key}")

    def stages_s(self, tokens: int) -> tuple[float, float, float]:
        """Seconds of encode, wire and landing of ``tokens``."""
        raw = tokens * self.token_bytes
        return (
            self.layers * self.encode_layer_s + raw / self.encode_bytes_per_s,
            self.layers * self.wire_layer_s + raw / (self.ratio * self.wire_bytes_per_s),
            self.layers * self.decode_layer_s + raw / self.decode_bytes_per_s,
        )

    def serial_s(self, tokens: int) -> float:
        """T above; 0 for no tokens."""
        return self.latency_s + sum(self.stages_s(tokens)) if tokens > 0 else 0.0

    def exposed_s(self, tokens: int, prefill_s: float) -> float:
        """T_exposed above; 0 for no tokens."""
        if tokens <= 0:
            return 0.0
        stages = self.stages_s(tokens)
        late = max(0.0, max(stages) - prefill_s) * (1 - 1 / self.layers)
        return self.latency_s + sum(stages) / self.layers + late


def choose(costs: Mapping[str, HandoffCost], tokens: int, prefill_s: float = 0.0) -> str:
    """The codec that the workers' own chooser takes for a prompt of ``tokens`` alone on the link, all of it still to be
    computed in ``prefill_s``.

    ``costs``: by codec, at least one, over the same link and all of the same quality.
    """
    one = next(iter(costs.values()))
    candidates = [
        chooser.Candidate(
            name,
            cost.ratio,
            chooser.Speed(cost.encode_layer_s, cost.encode_bytes_per_s),
            chooser.Speed(cost.decode_layer_s, cost.decode_bytes_per_s),
        )
        for name, cost in costs.items()
    ]
    link = chooser.Link(one.wire_bytes_per_s, one.wire_layer_s)
    return chooser.choose(
        candidates, link, chooser.Ahead(tokens * one.token_bytes, one.layers, prefill_s=prefill_s)
    ).codec
