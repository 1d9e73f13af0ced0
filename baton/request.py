"""A request as every process sees it, after validation and tokenization at the router."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a stream ended."""

    STOP = "stop"  # end-of-turn token, stop token id or stop string
    LENGTH = "length"  # max_tokens or the end of the context


@dataclass(frozen=True, slots=True)
class Bias:
    """``bias`` is added to the logit of ``token``."""

    token: int
    bias: float


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Limits are checked once, in ``router.validate``; the engine trusts them.

    The order is fixed: biases; repetition, presence and frequency penalties; temperature; top_k; top_p; min_p; draw.
    ``temperature == 0`` is greedy. The draw for output token ``i`` uses a random number that is a pure function
    of ``(seed, i)``, so a request's tokens do not depend on the batch around it nor on the worker that draws them.
    """

    temperature: float = 1.0
    top_p: float = 1.0  # (0, 1]; 1 keeps all
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0  # [0, 1]; relative to the most likely token
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    seed: int = 0  # [0, 2**63)
    max_tokens: int = 16  # >= 1, and prompt + max_tokens <= context
    min_tokens: int = 0  # end tokens are masked until this many tokens are out
    stop_token_ids: tuple[int, ...] = ()  # end the sequence, unconditionally
    eos_token_ids: tuple[int, ...] = ()  # end-of-turn tokens; empty when the client set ignore_eos
    logprobs: bool = False
    top_logprobs: int = 0  # [0, 20] alternatives per token; needs logprobs
    logit_bias: tuple[Bias, ...] = ()  # one per token at most


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence to compute: what the router sends to workers and the engine schedules.

    ``budget_s`` is the time left until the client's deadline when the message was sent; every process turns it
    into its own monotonic clock, so machines need no common clock. ``priority``: larger runs earlier.
    ``output``: tokens that the client has already, of a worker that was lost; they are computed again, never emitted
    again, and the next one has their number as its index (ADR 18).
    """

    request_id: str
    prompt: tuple[int, ...] = field(repr=False)  # a repr may end up in a log, where no prompt belongs
    sampling: Sampling
    priority: int
    budget_s: float
    session: str = ""  # digest of the client's name for the conversation; empty when it gave none
    output: tuple[int, ...] = field(default=(), repr=False)

    @property
    def known(self) -> tuple[int, ...]:
        """Every token whose KV must be there before the next one can be chosen."""
        return self.prompt + self.output


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of a token under the model's distribution before any sampling transform."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token of one sequence. ``index`` counts output tokens from 0; ``finish`` is set on the last."""

    request_id: str
    index: int
    token: int
    logprob: float | None = None
    top: tuple[Logprob, ...] = ()
    finish: str = ""  # a FinishReason value, or "" while the sequence goes on
