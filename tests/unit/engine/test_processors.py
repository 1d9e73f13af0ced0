"""The sampler's changes to logits against transformers' own processors, in the order that both apply them."""

from __future__ import annotations

import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from baton.request import Bias, Sampling
from engine.sampler import Row, counts_for, sample

VOCAB = 200
PROMPT = [3, 5, 8, 13, 21]
EOS = 2
BIASES = {7: 4.0, 8: -100.0, 13: 2.5, EOS: 3.0}


def test_biases_repetition_and_min_tokens_choose_as_transformers_does() -> None:
    theirs = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor({(token,): bias for token, bias in BIASES.items()}),
            RepetitionPenaltyLogitsProcessor(1.3),
            MinNewTokensLengthLogitsProcessor(len(PROMPT), 20, EOS),
        ]
    )
    sampling = Sampling(
        temperature=0.0,
        repetition_penalty=1.3,
        min_tokens=20,
        eos_token_ids=(EOS,),
        logit_bias=tuple(Bias(token, bias) for token, bias in BIASES.items()),
    )
    generator = torch.Generator().manual_seed(4)
    counts = counts_for(sampling, PROMPT)
    assert counts is not None
    tokens = list(PROMPT)
    changed = 0
    for index in range(60):
        logits = torch.randn(1, VOCAB, generator=generator) * 2
        expected = int(theirs(torch.tensor([tokens]), logits.clone()).argmax())
        [choice] = sample(logits, [Row(sampling, index, counts)])
        assert choice.token == expected
        changed += expected != int(logits.argmax())
        tokens.append(expected)
        counts.add(expected)
    assert changed > 10
