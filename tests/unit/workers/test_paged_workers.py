"""Workers whose KV lies where kernels reach it, against workers that copy it: the same tokens for the same prompt."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import decode_worker.worker
import prefill_worker.worker
from baton.config import parse
from baton.wire import inference_pb2 as pb
from engine.build import load_model
from engine.cache import KVCache, PagedKV
from engine.device_pages import DevicePages
from engine.kernels.codec import PagedKernels
from engine.model import Model

if TYPE_CHECKING:
    from tests.unit.workers.conftest import Serve

CODECS = ("raw", "lossless")
CONFIG = parse(
    {
        "model": {"dtype": "float32", "max_context": 512},
        "prefill": {"kv_tokens": 1024, "threads": 1, "page_tokens": 16},
        "decode": {"kv_tokens": 1024, "threads": 1, "page_tokens": 32},
        "handoff": {"transport": "tcp", "landing_bytes": 32 << 20, "staging_bytes": 32 << 20},
    }
)
PROMPT = "A port is where a ship that carries a great deal of"


class OneAtATime:
    """The kernels, as Triton's interpreter needs them; counts what is asked of them."""

    def __init__(self) -> None:
        self.calls = Counter[str]()
        self._gate, self._kernels = threading.Lock(), PagedKernels()

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            with self._gate:
                self.calls[name] += 1
                getattr(self._kernels, name)(*arguments)

        return call


async def answers(serve: Serve, model: Model) -> list[list[int]]:
    """Tokens of one greedy request by codec."""
    found = []
    async with serve(model, CONFIG) as service:
        for codec in CODECS:
            request = pb.GenerateRequest(
                prompt=PROMPT, sampling=pb.Sampling(temperature=0.0, max_tokens=8), handoff=pb.Handoff(codec=codec)
            )
            tokens: list[int] = []
            async for response in service.stream(request, arrived_s=time.monotonic()):
                tokens += response.token_ids
            found.append(tokens)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the workers find the GPU's pages by themselves")
async def test_tokens_are_the_same(serve: Serve, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = await asyncio.to_thread(load_model, model_folder, "float32", 1)
    copied = await answers(serve, model)
    assert all(len(tokens) == 8 for tokens in copied)

    kernels = OneAtATime()

    def reached(cache: PagedKV) -> DevicePages:
        assert isinstance(cache, KVCache)
        pages = DevicePages(cache)
        pages.kernels = kernels  # type: ignore[assignment]
        return pages

    for module in (prefill_worker.worker, decode_worker.worker):
        monkeypatch.setattr(module, "device_pages", reached)
    assert await answers(serve, model) == copied
    assert kernels.calls.keys() == {"gather", "scatter", "split", "join"}
