"""Device sampling against its sorting twin and against the sampler that defines it."""

from __future__ import annotations

import random

import pytest
import torch

from baton.request import Sampling
from engine import sampler
from engine.kernels import reference, sampling

BLOCK = 128  # several blocks of a small vocabulary


def choose(logits: torch.Tensor, samplings: list[Sampling]) -> list[int]:
    """The kernel's tokens, after its twin and the sampler agreed with them."""
    rows = [sampler.Row(sampling, index) for index, sampling in enumerate(samplings)]
    controls = sampler.controls(rows).to(logits.device)
    tokens: list[int] = sampling.choose(logits, controls, BLOCK).tolist()
    assert tokens == reference.choose(logits, controls).tolist()
    assert tokens == [choice.token for choice in sampler.sample(logits, rows)]
    return tokens


@pytest.mark.parametrize("round_number", range(4))
def test_random_rows(round_number: int, device: torch.device) -> None:
    draw = random.Random(round_number)
    vocab = draw.choice([1, 127, 128, 300])
    logits = torch.randn(6, vocab, device=device, generator=torch.Generator(device).manual_seed(round_number)) * 4
    if round_number % 2:
        logits = logits.round()  # ties everywhere
    samplings = [
        Sampling(
            temperature=draw.choice([0.0, 0.3, 1.0, 2.5]),
            top_k=draw.choice([0, 0, 1, 5, 40, 1000]),
            top_p=draw.choice([1.0, 1.0, 0.1, 0.7, 0.95]),
            min_p=draw.choice([0.0, 0.0, 0.05]),
            seed=draw.getrandbits(64),
        )
        for _ in range(6)
    ]
    choose(logits, samplings)


def test_greedy_takes_the_smallest_of_equal_ids(device: torch.device) -> None:
    logits = torch.zeros(1, 300, device=device)
    logits[0, [77, 200, 290]] = 2.0
    controls = sampler.controls([sampler.Row(Sampling(temperature=0.0), 0)]).to(device)
    assert sampling.choose(logits, controls, BLOCK).tolist() == [77]
    assert reference.choose(logits, controls).tolist() == [77]


def test_top_k_keeps_tokens_equal_to_the_last(device: torch.device) -> None:
    logits = torch.full((1, 200), -30.0, device=device)
    logits[0, [3, 50, 150, 199]] = torch.tensor([5.0, 4.0, 4.0, 4.0], device=device)
    drawn = {choose(logits, [Sampling(temperature=50.0, top_k=2, seed=seed)])[0] for seed in range(12)}
    assert drawn == {3, 50, 150, 199}


def test_both_zeros_are_one_number(device: torch.device) -> None:
    logits = torch.full((1, 8), -50.0, device=device)
    logits[0, 2], logits[0, 5] = 0.0, -0.0
    drawn = {choose(logits, [Sampling(temperature=1.0, top_k=1, seed=seed)])[0] for seed in range(12)}
    assert drawn == {2, 5}


def test_masked_tokens_are_never_drawn(device: torch.device) -> None:
    logits = torch.full((4, 150), -torch.inf, device=device)
    logits[:, [9, 140]] = torch.tensor([1.0, 1.5], device=device)
    samplings = [Sampling(seed=1), Sampling(top_k=100, seed=2), Sampling(top_p=0.999, seed=3), Sampling(min_p=0.01)]
    assert set(choose(logits, samplings)) <= {9, 140}


def test_a_uniform_that_rounds_to_one_stays_inside(device: torch.device) -> None:
    logits = torch.zeros(1, 130, device=device)
    logits[0, 128:] = -torch.inf
    controls = torch.tensor([[1.0], [0.0], [1.0], [0.0], [1.0]], dtype=torch.float64, device=device)
    assert sampling.choose(logits, controls, BLOCK).tolist() == [127]
