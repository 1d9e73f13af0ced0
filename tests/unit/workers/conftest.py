"""A router with one prefill and one decode worker, in this process and without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import pytest

from baton.config import Config
from decode_worker.worker import DecodeWorker
from engine.model import Model
from prefill_worker.worker import PrefillWorker
from router.peers import WorkerAddress
from router.service import InferenceService

HOST = "127.0.0.1"

Serve: TypeAlias = Callable[[Model, Config], AbstractAsyncContextManager[InferenceService]]


@pytest.fixture
def serve(model_folder: Path) -> Serve:
    """A function that starts them for a model and a configuration, and ends them."""

    @asynccontextmanager
    async def start(model: Model, config: Config) -> AsyncIterator[InferenceService]:
        prefill = PrefillWorker(model, config, worker_id="p", host=HOST)
        decode = DecodeWorker(model, config, worker_id="d", host=HOST)
        service = InferenceService(config, model_folder, router_id="r")
        await prefill.start()
        await decode.start()
        service.pools.update("prefill", [WorkerAddress("prefill", "p", HOST, prefill.port, prefill.generation)])
        service.pools.update("decode", [WorkerAddress("decode", "d", HOST, decode.port, decode.generation)])
        async with asyncio.timeout(10):
            while not service.ready:
                await asyncio.sleep(0.02)
        try:
            yield service
        finally:
            await service.close()
            await prefill.close()
            await decode.close()

    return start
