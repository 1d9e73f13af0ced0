"""The sampling part of a request: its limits, its defaults, and what workers compute by."""

from __future__ import annotations

from baton.errors import CONTEXT_LENGTH_EXCEEDED, InvalidRequest
from baton.request import Bias, Sampling
from baton.wire import inference_pb2 as pb
from engine.text import Tokenizer
from router.fields import check_ids, check_range

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 64
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BIAS = 100.0
LEAST_DIVISOR = 0.01  # logits divided by less leave float32's range


def check(sampling: pb.Sampling, vocab_size: int) -> None:
    """Everything that does not depend on the prompt."""
    if not (sampling.HasField("temperature") and sampling.temperature == 0):
        check_range("sampling.temperature", _temperature(sampling), LEAST_DIVISOR, 2, also="0 or ")
    if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:
        raise InvalidRequest("sampling.top_p", f"is {sampling.top_p}; allowed: (0, 1]")
    check_range("sampling.top_k", sampling.top_k, 0, vocab_size)
    check_range("sampling.min_p", sampling.min_p, 0, 1)
    check_range("sampling.repetition_penalty", _repetition_penalty(sampling), LEAST_DIVISOR, 2)
    check_range("sampling.presence_penalty", sampling.presence_penalty, -2, 2)
    check_range("sampling.frequency_penalty", sampling.frequency_penalty, -2, 2)
    if sampling.seed < 0:
        raise InvalidRequest("sampling.seed", f"is {sampling.seed}; allowed: [0, 2^63)")
    if sampling.HasField("max_tokens") and sampling.max_tokens < 1:
        raise InvalidRequest("sampling.max_tokens", f"is {sampling.max_tokens}; must be at least 1")
    _check_stops(sampling, vocab_size)
    _check_biases(sampling, vocab_size)
    check_range("sampling.top_logprobs", sampling.top_logprobs, 0, MAX_TOP_LOGPROBS)
    if sampling.top_logprobs and not sampling.logprobs:
        raise InvalidRequest("sampling.top_logprobs", f"is {sampling.top_logprobs}, but sampling.logprobs is not set")


def _check_stops(sampling: pb.Sampling, vocab_size: int) -> None:
    check_range("sampling.stop", len(sampling.stop), 0, MAX_STOP_STRINGS, what="has {} strings")
    for index, stop in enumerate(sampling.stop):
        check_range(f"sampling.stop[{index}]", len(stop), 1, MAX_STOP_CHARS, what="is {} characters long")
    check_range("sampling.stop_token_ids", len(sampling.stop_token_ids), 0, MAX_STOP_IDS, what="has {} ids")
    check_ids("sampling.stop_token_ids", sampling.stop_token_ids, vocab_size)


def _check_biases(sampling: pb.Sampling, vocab_size: int) -> None:
    check_range("sampling.logit_bias", len(sampling.logit_bias), 0, MAX_BIASES, what="has {} ids")
    for token, bias in sampling.logit_bias.items():
        field = f"sampling.logit_bias[{token}]"
        if not 0 <= token < vocab_size:
            raise InvalidRequest(field, f"is for id {token}; the vocabulary is [0, {vocab_size})")
        check_range(field, bias, -MAX_BIAS, MAX_BIAS)


def fill(
    sampling: pb.Sampling, prompt_tokens: int, context_tokens: int, tokenizer: Tokenizer, random_seed: int
) -> Sampling:
    """``sampling``, already checked on its own, for a prompt of this length."""
    room = context_tokens - prompt_tokens
    max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else room
    if max_tokens > room:
        raise InvalidRequest(
            "sampling.max_tokens",
            f"is {max_tokens}; the context has {context_tokens} tokens and the input takes {prompt_tokens}, "
            f"so at most {room} are allowed",
            reason=CONTEXT_LENGTH_EXCEEDED,
        )
    check_range("sampling.min_tokens", sampling.min_tokens, 0, max_tokens)
    return Sampling(
        temperature=_temperature(sampling),
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=_repetition_penalty(sampling),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed if sampling.HasField("seed") else random_seed,
        max_tokens=max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=tuple(sampling.stop_token_ids),
        eos_token_ids=() if sampling.ignore_eos else tokenizer.eos_token_ids,
        logprobs=sampling.logprobs,
        top_logprobs=sampling.top_logprobs,
        logit_bias=tuple(Bias(token, bias) for token, bias in sorted(sampling.logit_bias.items())),
    )


def _temperature(sampling: pb.Sampling) -> float:
    return sampling.temperature if sampling.HasField("temperature") else 1.0


def _repetition_penalty(sampling: pb.Sampling) -> float:
    return sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
