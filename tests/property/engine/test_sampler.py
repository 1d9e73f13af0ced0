"""The sampler against a slow, row-by-row reference in numpy, on random logits and random parameters."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.request import Bias, Sampling
from engine import sampler
from engine.sampler import Choice, Row, counts_for, sample, uniform

VOCAB = 40


def reference(logits: np.ndarray, sampling: Sampling, index: int, prompt: list[int], outputs: list[int]) -> int | None:
    """The token that ``sampling`` chooses; None when two answers are right within rounding."""
    scores = adjusted(logits, sampling, index, prompt, outputs)
    if sampling.temperature == 0.0:
        best = np.sort(scores)[::-1]
        return None if best[0] - best[1] < 1e-4 else int(scores.argmax())
    scores = (scores - scores.max()) / sampling.temperature
    weights = truncated(scores, sampling)
    if weights is None:
        return None
    mass = np.cumsum(weights)
    target = uniform(sampling.seed, index) * mass[-1]
    if np.abs(mass - target).min() < 1e-4 * mass[-1]:
        return None
    return int(np.searchsorted(mass, target, side="right"))


def adjusted(logits: np.ndarray, sampling: Sampling, index: int, prompt: list[int], outputs: list[int]) -> np.ndarray:
    """Biases, penalties and masked end tokens."""
    scores = logits.astype(np.float64)
    for each in sampling.logit_bias:
        scores[each.token] += each.bias
    for token in set(prompt) | set(outputs):
        scores[token] *= sampling.repetition_penalty if scores[token] <= 0 else 1.0 / sampling.repetition_penalty
        count = outputs.count(token)
        scores[token] -= sampling.presence_penalty * (count > 0) + sampling.frequency_penalty * count
    if index < sampling.min_tokens:
        scores[list(sampling.eos_token_ids + sampling.stop_token_ids)] = -np.inf
    return scores


def truncated(scores: np.ndarray, sampling: Sampling) -> np.ndarray | None:
    """Unnormalised probabilities after top_k, top_p and min_p; None when a rounding error decides about a token."""
    order = sorted(range(VOCAB), key=lambda token: -scores[token])
    weights: np.ndarray = np.exp(scores)
    if 0 < sampling.top_k < VOCAB:
        weights[scores < scores[order[sampling.top_k - 1]]] = 0.0
    if sampling.top_p < 1.0:
        before, total = 0.0, weights.sum()
        for token in order:
            if abs(before - sampling.top_p * total) < 1e-4 * total:
                return None
            before, weights[token] = before + weights[token], weights[token] * (before < sampling.top_p * total)
    near = np.abs(weights - sampling.min_p) < 1e-4
    if 0.0 < sampling.min_p < 1.0 and near.any():
        return None
    weights[weights < sampling.min_p] = 0.0
    return weights


token_ids = st.integers(0, VOCAB - 1)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-3, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    top_k=st.sampled_from([0, 1, 3, 20, 400]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.3]),
    presence_penalty=st.sampled_from([0.0, -0.5, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**63 - 1),
    min_tokens=st.integers(0, 3),
    stop_token_ids=st.lists(token_ids, max_size=3).map(tuple),
    eos_token_ids=st.lists(token_ids, max_size=2).map(tuple),
    logit_bias=st.dictionaries(token_ids, st.sampled_from([-100.0, -2.5, 1.0, 100.0]), max_size=4).map(
        lambda biases: tuple(Bias(token, bias) for token, bias in biases.items())
    ),
)
rows = st.tuples(
    samplings,
    st.lists(token_ids, min_size=1, max_size=8),
    st.lists(token_ids, max_size=8),
    st.integers(0, 2**32 - 1),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(rows, min_size=1, max_size=6), st.sampled_from([2, 512]))
def test_equals_the_reference_in_any_batch(batch: list[tuple[Sampling, list[int], list[int], int]], best: int) -> None:
    logits = np.stack([np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32) for *_, seed in batch])
    prepared = []
    for sampling, prompt, outputs, _ in batch:
        counts = counts_for(sampling, prompt)
        for token in outputs:
            if counts is not None:
                counts.add(token)
        prepared.append(Row(sampling, len(outputs), counts))
    before = torch.from_numpy(logits)
    given_logits = before.clone()
    previous, sampler.TOP_P_CANDIDATES = sampler.TOP_P_CANDIDATES, best  # 2: the full sort is needed often
    try:
        together = sample(given_logits, prepared)
        alone = [sample(given_logits[i : i + 1], [row])[0] for i, row in enumerate(prepared)]
    finally:
        sampler.TOP_P_CANDIDATES = previous
    assert torch.equal(before, given_logits)
    assert together == alone
    for index, (sampling, prompt, outputs, _) in enumerate(batch):
        expected = reference(logits[index], sampling, len(outputs), prompt, outputs)
        assert expected is None or expected == together[index].token


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_uniform_is_in_the_unit_interval_and_depends_on_both(seed: int, index: int) -> None:
    value = uniform(seed, index)
    assert 0.0 <= value < 1.0
    assert value == uniform(seed, index)
    assert value != uniform(seed, index + 1)
    assert value != uniform(seed ^ 1, index)


def test_uniform_is_uniform_over_indexes_and_over_seeds() -> None:
    for values in ([uniform(5, i) for i in range(20000)], [uniform(i, 5) for i in range(20000)]):
        counts, _ = np.histogram(values, bins=20, range=(0, 1))
        assert np.abs(counts - 1000).max() < 160  # five standard deviations


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    draws = [sample(logits, [Row(Sampling(seed=11), i)])[0].token for i in range(8000)]
    shares = np.bincount(draws, minlength=4) / 8000
    assert np.abs(shares - torch.softmax(logits[0], 0).numpy()).max() < 0.03


def test_ties_are_kept_together_and_greedy_takes_the_first() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    assert sample(logits, [Row(Sampling(temperature=0.0), 0)]) == [Choice(1)]
    drawn = {sample(logits, [Row(Sampling(top_k=2, seed=seed), 0)])[0].token for seed in range(60)}
    assert drawn == {1, 2, 3}


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    sampling = Sampling(temperature=0.0, logprobs=True, top_logprobs=20, min_tokens=1, eos_token_ids=(1,))
    [choice] = sample(logits, [Row(sampling, 0)])
    expected = torch.log_softmax(logits[0], 0).tolist()
    assert (choice.token, choice.logprob) == (2, expected[2])
    assert [(alternative.token, alternative.logprob) for alternative in choice.top] == [
        (1, expected[1]),
        (2, expected[2]),
        (0, expected[0]),
    ]
