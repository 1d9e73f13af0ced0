"""The simplest cost model: a step costs a constant, so much a prefill token, a sequence and a token of context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Seconds; a handoff takes ``transfer_token_s`` a token, of which the share ``exposed`` waits after prefill."""

    base_s: float
    prefill_token_s: float
    sequence_s: float
    context_token_s: float
    transfer_token_s: float = 0.0
    exposed: float = 1.0
    capacity_tokens: int = 1 << 20
    gpus: int = 1

    def sum_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_sum: int) -> float:
        prefill_s = self.prefill_token_s * sum(count for _, count in chunks)
        if not batch:
            return self.base_s + prefill_s if chunks else 0.0
        return prefill_s + self.decode_step_s(batch, context_sum)

    def decode_step_s(self, batch: int, context_sum: int) -> float:
        return self.base_s + self.sequence_s * batch + self.context_token_s * context_sum if batch else 0.0

    def transfer_s(self, tokens: int) -> float:
        return self.transfer_token_s * tokens

    def exposed_transfer_s(self, tokens: int) -> float:
        return self.exposed * self.transfer_token_s * tokens

    def kv_tokens(self) -> int:
        return self.capacity_tokens
