"""The next token of every row, as :class:`baton.request.Sampling` defines it, over the whole batch at once.

Ties are never broken by chance or by the batch: ``top_k`` keeps every token as likely as the k-th, ``top_p`` every
token as likely as the last one it needs, and the draw walks the kept tokens in the order of their ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from baton.request import Logprob, Sampling

TOP_P_CANDIDATES = 512  # the likeliest tokens usually hold top_p of the mass; sorting all of them is 20 times dearer
NO_TOKEN = -1  # of logits that are not finite: the model's weights or the KV it read are broken
_MASK64 = (1 << 64) - 1


class TokenCounts:
    """How often each token was put out, for penalties; prompt tokens that were never put out count 0."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self._outputs = dict.fromkeys(prompt, 0)

    def add(self, token: int) -> None:
        self._outputs[token] = self._outputs.get(token, 0) + 1

    @property
    def tokens(self) -> list[int]:
        return list(self._outputs)

    @property
    def outputs(self) -> list[int]:
        return list(self._outputs.values())


def counts_for(sampling: Sampling, prompt: Iterable[int], output: Iterable[int] = ()) -> TokenCounts | None:
    """What the penalties of ``sampling`` must remember; None when it has none."""
    used = sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
    if not used:
        return None
    counts = TokenCounts(prompt)
    for token in output:
        counts.add(token)
    return counts


@dataclass(frozen=True, slots=True)
class Row:
    """One row of logits: whose they are, and which output token they decide (from 0)."""

    sampling: Sampling
    index: int
    counts: TokenCounts | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    token: int
    logprob: float | None = None
    top: tuple[Logprob, ...] = field(default=())


def sample(logits: Tensor, rows: Sequence[Row]) -> list[Choice]:
    """One choice per row; :data:`NO_TOKEN` where there is none. logits: [rows, vocab], any float dtype; not changed."""
    raw = logits.float()
    adjusted = _adjust(raw, rows)
    tokens = _choose_on_gpu(adjusted, rows) if adjusted.is_cuda else _choose(adjusted, rows)
    tokens = tokens.masked_fill(~adjusted.amax(dim=-1).isfinite(), NO_TOKEN)  # a NaN is its row's maximum
    choices: list[Choice] = [Choice(token) for token in tokens.tolist()]
    for index, row in enumerate(rows):
        if row.sampling.logprobs and choices[index].token != NO_TOKEN:
            choices[index] = _with_logprobs(raw[index], choices[index].token, row.sampling.top_logprobs)
    return choices


def controls(rows: Sequence[Row]) -> Tensor:
    """What :func:`engine.kernels.sampling.choose` must know of each row: [5, rows], float64, on the host."""
    columns = (
        [row.sampling.temperature for row in rows],
        [row.sampling.top_k for row in rows],
        [row.sampling.top_p for row in rows],
        [row.sampling.min_p for row in rows],
        [uniform(row.sampling.seed, row.index) if row.sampling.temperature > 0.0 else 0.0 for row in rows],
    )
    return torch.tensor(columns, dtype=torch.float64)


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) that draws output token ``index``: splitmix64 (Steele et al., OOPSLA'14), top 53 bits."""
    mixed = _splitmix64(_splitmix64(seed & _MASK64) ^ (index & _MASK64))
    return (mixed >> 11) * 2.0**-53


def _splitmix64(state: int) -> int:
    mixed = (state + 0x9E3779B97F4A7C15) & _MASK64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK64
    return mixed ^ (mixed >> 31)


def _choose(adjusted: Tensor, rows: Sequence[Row]) -> Tensor:
    """Tokens [rows]. adjusted: [rows, vocab]."""
    tokens = adjusted.argmax(dim=-1)
    drawing = [index for index, row in enumerate(rows) if row.sampling.temperature > 0.0]
    if drawing:
        chosen = adjusted if len(drawing) == len(rows) else adjusted[drawing]
        tokens[drawing] = _draw(chosen, [rows[index] for index in drawing])
    return tokens


def _choose_on_gpu(adjusted: Tensor, rows: Sequence[Row]) -> Tensor:
    """As :func:`_choose`, in one kernel, and the host waits for nothing."""
    from engine.kernels import sampling  # Triton, which only CUDA needs

    return sampling.choose(adjusted, controls(rows).pin_memory().to(adjusted.device, non_blocking=True))


def _adjust(raw: Tensor, rows: Sequence[Row]) -> Tensor:
    """Biases, penalties, end tokens masked until ``min_tokens`` are out. ``raw`` itself when no row needs any."""
    biased = [(index, each.token, each.bias) for index, row in enumerate(rows) for each in row.sampling.logit_bias]
    penalised = [(index, row.sampling, row.counts) for index, row in enumerate(rows) if row.counts is not None]
    masked = [
        (index, token)
        for index, row in enumerate(rows)
        if row.index < row.sampling.min_tokens
        for token in (*row.sampling.eos_token_ids, *row.sampling.stop_token_ids)
        if 0 <= token < raw.shape[1]  # a tokenizer may name end tokens that the model has not
    ]
    if not biased and not penalised and not masked:
        return raw
    adjusted = raw.clone()
    if biased:
        of, tokens, biases = (torch.tensor(column, device=raw.device) for column in zip(*biased, strict=True))
        adjusted[of, tokens] += biases
    for index, sampling, counts in penalised:
        _penalise(adjusted[index], sampling, counts)
    if masked:
        where = torch.tensor(masked, device=raw.device)
        adjusted[where[:, 0], where[:, 1]] = -torch.inf
    return adjusted


def _penalise(logits: Tensor, sampling: Sampling, counts: TokenCounts) -> None:
    """Changes ``logits`` [vocab] in place, at the tokens seen so far only."""
    tokens = torch.tensor(counts.tokens, device=logits.device)
    outputs = torch.tensor(counts.outputs, device=logits.device, dtype=logits.dtype)
    seen = logits[tokens]
    repetition = sampling.repetition_penalty  # CTRL, arXiv:1909.05858; over negative logits it must multiply
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    seen -= sampling.presence_penalty * (outputs > 0) + sampling.frequency_penalty * outputs
    logits[tokens] = seen


def _draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Tokens [rows] by inverse CDF in float64 after temperature, top_k, top_p and min_p. logits: [rows, vocab]."""
    samplings = [row.sampling for row in rows]
    temperature = _column([s.temperature for s in samplings], logits.device)
    scaled = logits.double()
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / temperature  # <= 0, so no temperature overflows
    _apply_top_k(scaled, samplings)
    weights = scaled.exp()
    _apply_top_p(weights, samplings)
    if any(s.min_p > 0.0 for s in samplings):
        weights.masked_fill_(weights < _column([s.min_p for s in samplings], logits.device), 0.0)  # the top weighs 1
    mass = weights.cumsum(dim=-1)
    target = _column([uniform(row.sampling.seed, row.index) for row in rows], logits.device) * mass[:, -1:]
    return torch.searchsorted(mass, target, right=True).squeeze(-1)


def _apply_top_k(scaled: Tensor, samplings: Sequence[Sampling]) -> None:
    vocab = scaled.shape[1]
    keeps = [min(s.top_k or vocab, vocab) for s in samplings]
    limited = [index for index, keep in enumerate(keeps) if keep < vocab]
    if not limited:
        return
    best = scaled[limited].topk(max(keeps[index] for index in limited), dim=-1).values
    kth = best.gather(1, torch.tensor([[keeps[index] - 1] for index in limited], device=scaled.device))
    scaled[limited] = scaled[limited].masked_fill(scaled[limited] < kth, -torch.inf)


def _apply_top_p(weights: Tensor, samplings: Sequence[Sampling]) -> None:
    """Keeps the tokens before which, in falling weight, less than ``top_p`` of the mass lies."""
    limited = [index for index, s in enumerate(samplings) if s.top_p < 1.0]
    if not limited:
        return
    rows = weights[limited]
    wanted = _column([samplings[index].top_p for index in limited], weights.device) * rows.sum(dim=-1, keepdim=True)
    best = rows.topk(min(TOP_P_CANDIDATES, rows.shape[1]), dim=-1).values
    if bool((best.sum(dim=-1, keepdim=True) < wanted).any()):
        best = rows.sort(dim=-1, descending=True).values
    last = (best.cumsum(dim=-1) - best < wanted).sum(dim=-1, keepdim=True) - 1
    weights[limited] = rows.masked_fill(rows < best.gather(1, last.clamp_(min=0)), 0.0)


def _with_logprobs(raw: Tensor, token: int, top: int) -> Choice:
    """raw: [vocab], the model's own logits."""
    logprobs = raw.log_softmax(dim=-1)
    best = logprobs.topk(min(top, logprobs.shape[0]))
    alternatives = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Choice(token, float(logprobs[token]), tuple(Logprob(*alternative) for alternative in alternatives))


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]
