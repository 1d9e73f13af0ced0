"""A deployment's limits, and parsing under them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from baton.wire import inference_pb2 as pb
from engine.text import Tokenizer
from router.validate import Limits, ParsedRequest, parse


@pytest.fixture(scope="session")
def limits() -> Limits:
    return Limits(
        model="smollm2-135m-instruct",
        context_tokens=64,
        max_request_bytes=1 << 20,
        max_deadline_s=600.0,
        codec="lossless",
        quality_floor="exact",
    )


@pytest.fixture(scope="session")
def parsed(tokenizer: Tokenizer, limits: Limits) -> Callable[..., ParsedRequest]:
    """``parse`` under these limits (or others) with seed 7: ``parsed(request, limits=..., remaining_s=...)``."""
    default = limits

    def call(
        request: pb.GenerateRequest, limits: Limits = default, seed: int = 7, remaining_s: float | None = None
    ) -> ParsedRequest:
        return parse(request, limits, tokenizer, seed=seed, grpc_remaining_s=remaining_s)

    return call
