"""A router with its workers, in this process and without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
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
Found: TypeAlias = Callable[..., AbstractAsyncContextManager["House"]]
Worker: TypeAlias = PrefillWorker | DecodeWorker


@dataclass
class House:
    """A router and the workers that its directory names."""

    model: Model
    config: Config
    service: InferenceService
    workers: dict[str, Worker] = field(default_factory=dict)

    async def hire(self, worker_id: str) -> None:
        """A new worker: a decode worker if its id begins with a d, else a prefill worker."""
        kind = DecodeWorker if worker_id.startswith("d") else PrefillWorker
        worker = kind(self.model, self.config, worker_id=worker_id, host=HOST)
        await worker.start()
        self.workers[worker_id] = worker
        self._tell()

    async def lose(self, worker_id: str) -> None:
        """Its connections break, as when its process dies."""
        worker = self.workers.pop(worker_id)
        self._tell()
        await worker.close()

    async def ready(self, prefill: int, decode: int) -> None:
        async with asyncio.timeout(10):
            while (len(self.service.pools.of("prefill")), len(self.service.pools.of("decode"))) != (prefill, decode):
                await asyncio.sleep(0.02)

    async def close(self) -> None:
        await self.service.close()
        for worker in self.workers.values():
            await worker.close()

    def _tell(self) -> None:
        for role, initial in (("prefill", "p"), ("decode", "d")):
            named = {name: worker for name, worker in self.workers.items() if name.startswith(initial)}
            self.service.pools.update(
                role,  # type: ignore[arg-type]
                [WorkerAddress(role, name, HOST, one.port, one.generation) for name, one in named.items()],  # type: ignore[arg-type]
            )


@pytest.fixture
def found(model_folder: Path) -> Found:
    """A function that starts a house with that many workers of each kind, and ends it."""

    @asynccontextmanager
    async def start(model: Model, config: Config, prefill: int = 1, decode: int = 1) -> AsyncIterator[House]:
        house = House(model, config, InferenceService(config, model_folder, router_id="r"))
        try:
            for name in [*(f"p{n}" for n in range(prefill)), *(f"d{n}" for n in range(decode))]:
                await house.hire(name)
            await house.ready(prefill, decode)
            yield house
        finally:
            await house.close()

    return start


@pytest.fixture
def serve(found: Found) -> Serve:
    """The same with one worker of each kind, where only the service matters."""

    @asynccontextmanager
    async def start(model: Model, config: Config) -> AsyncIterator[InferenceService]:
        async with found(model, config) as house:
            yield house.service

    return start
