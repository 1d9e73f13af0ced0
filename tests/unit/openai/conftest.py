"""The HTTP front in this process: real workers, the real service and a real server, without Ray.

Everything runs on an event loop in a thread of its own, so that tests may use synchronous clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import pytest
import uvicorn

from baton.config import Config, parse
from decode_worker.worker import DecodeWorker
from engine.build import load_model
from prefill_worker.worker import PrefillWorker
from router.openai.app import build
from router.peers import Role, WorkerAddress
from router.service import InferenceService

HOST = "127.0.0.1"
T = TypeVar("T")


class Server:
    """One prefill and one decode worker in loopback, a router, and its HTTP port."""

    def __init__(self, config: Config, folder: Path, router_id: str) -> None:
        self.config, self._folder, self._router_id = config, folder, router_id
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self._start(), timeout_s=120.0)
        self.http = httpx2.Client(base_url=self.url, timeout=60.0)

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = 60.0) -> T:
        """``work`` on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def held(self) -> dict[str, int]:
        """Everything that workers and router hold now; empty when all is free."""
        status = self.service.report()
        held = {"router.inflight": status.router.inflight}
        for pool in status.pools:
            for worker in pool.workers:
                for name in ("waiting", "running", "pages_used", "handoffs", "buffer_bytes_used"):
                    held[f"{worker.id}.{name}"] = getattr(worker.load, name)
        return {name: amount for name, amount in held.items() if amount}

    def wait_idle(self, timeout_s: float = 10.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while held := self.held():
            assert time.monotonic() < deadline_s, f"still held: {held}"
            time.sleep(0.05)

    def close(self) -> None:
        self.http.close()
        self.run(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10.0)
        self.loop.close()

    async def _start(self) -> None:
        model = load_model(self._folder, "float32", 1, None)
        self.prefill = PrefillWorker(model, self.config, worker_id="p", host=HOST)
        self.decode = DecodeWorker(model, self.config, worker_id="d", host=HOST)
        self.service = InferenceService(self.config, self._folder, router_id=self._router_id)
        workers: dict[Role, PrefillWorker | DecodeWorker] = {"prefill": self.prefill, "decode": self.decode}
        for role, worker in workers.items():
            await worker.start()
            address = WorkerAddress(role, worker.worker_id, HOST, worker.port, worker.generation)
            self.service.pools.update(role, [address])
        while not self.service.ready:
            await asyncio.sleep(0.02)
        self.app = build(self.service)
        settings = uvicorn.Config(self.app, host=HOST, port=0, lifespan="off", log_level="warning", ws="none")
        self._uvicorn = uvicorn.Server(settings)
        self._serving = asyncio.create_task(self._uvicorn.serve())
        while not self._uvicorn.started:
            await asyncio.sleep(0.02)
        self.port = self._uvicorn.servers[0].sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._uvicorn.should_exit = True
        await self._serving
        await self.service.close()
        await self.prefill.close()
        await self.decode.close()


ServerFactory = Callable[..., contextlib.AbstractContextManager[Server]]


@pytest.fixture(scope="session")
def start_server() -> ServerFactory:
    """A function that starts a server of the model in a folder, with a context of so many tokens."""

    @contextlib.contextmanager
    def start(
        folder: Path, *, max_context: int, max_request_bytes: int = 64 << 10, router_id: str = "r"
    ) -> Iterator[Server]:
        pool = {"kv_tokens": 4096, "threads": 1}
        config = parse(
            {
                "model": {"dtype": "float32", "max_context": max_context},
                "prefill": pool,
                "decode": pool,
                "handoff": {
                    "transport": "loopback",
                    "codec": "lossless",
                    "landing_bytes": 32 << 20,
                    "staging_bytes": 32 << 20,
                },
                "router": {"max_request_bytes": max_request_bytes, "max_inflight": 64},
            }
        )
        server = Server(config, folder, router_id)
        try:
            yield server
        finally:
            server.close()

    return start


@pytest.fixture(scope="session")
def server(start_server: ServerFactory, model_folder: Path) -> Iterator[Server]:
    with start_server(model_folder, max_context=512) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx2.Client]:
    """A plain client; whatever a test did, nothing may be held after it."""
    yield server.http
    server.wait_idle()
