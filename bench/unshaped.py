"""The handoff on this machine's own links: its rate against the transport's own, and what prefill does not hide.

Rates are of one prompt's bytes that lie in pages, between two processes on a core each. NIXL's own is a READ of all
pages at once, straight from one process's pages into the other's; the plain socket's is ``recv_into`` over loopback.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from baton.config import Config, ModelConfig, PoolConfig
from baton.config_handoff import HandoffConfig
from baton.config_security import SecurityConfig
from baton.errors import Unavailable
from baton.frames import FrameStream
from baton.messages import PLANE, Decode, Failed, Granted, Handed, Prefill, Report, Reserve
from baton.request import Sampling, Work
from bench.ends import SendEnd
from bench.link import RawSink
from bench.prompt import Prompt, text
from bench.remote import Remote
from bench.shaped import LOCAL, Bench, Way
from decode_worker.worker import DecodeWorker
from engine import hub
from engine.build import load_model
from kvtransfer.arena import HostMemory
from kvtransfer.transports.nixl import _Agent
from prefill_worker.worker import PrefillWorker

BUDGET_S = 120.0


class NixlEnd:
    """Pages that NIXL reads itself, with nothing of ours around it."""

    async def start(
        self, name: str, ucx_tls: str, pages: int, page_bytes: int, passive: bool
    ) -> tuple[bytes, list[int]]:
        """The agent's metadata, and the pages' addresses in no particular order."""
        self._memory, self._page_bytes = HostMemory(pages * page_bytes), page_bytes
        self._memory.view(0, self._memory.nbytes)[:] = random.Random(name).randbytes(self._memory.nbytes)
        self._agent = _Agent(self._memory, name=name, ucx_tls=ucx_tls, progress_thread=passive)
        self._pages = [self._memory.address + index * page_bytes for index in range(pages)]
        random.Random(pages).shuffle(self._pages)
        return self._agent.nixl.getLocalMD(), self._pages

    async def read(self, metadata: bytes, theirs: Sequence[int], repeats: int) -> list[float]:
        """Seconds of each of ``repeats`` READs of all pages."""
        agent, b = self._agent, self._agent.b
        name = agent.nixl.loadRemoteMD(metadata).decode()
        local, remote = b.nixlXferDList(b.DRAM_SEG), b.nixlXferDList(b.DRAM_SEG)
        for mine, other in zip(self._pages, theirs, strict=True):
            local.addDesc((mine, self._page_bytes, 0))
            remote.addDesc((other, self._page_bytes, 0))
        times = []
        for _ in range(repeats):
            begun_s = time.monotonic()
            handle = agent.nixl.createXferReq(b.NIXL_READ, local, remote, name, "", [])
            status = agent.nixl.postXferReq(handle)
            while status == b.NIXL_IN_PROG:
                status = agent.nixl.getXferStatus(handle)
            if status != b.NIXL_SUCCESS:
                raise RuntimeError(f"nixl: {status}")
            times.append(time.monotonic() - begun_s)
            agent.nixl.releaseXferReq(handle)
        return times


def nixl_rate(prompt: Prompt, ucx_tls: str, page_tokens: int, repeats: int) -> float:
    """GB/s of NIXL alone for ``prompt``'s bytes in pages of ``page_tokens`` tokens of one layer."""
    layout = prompt.layout
    shape = (layout.layers * -(-prompt.tokens // page_tokens), page_tokens * layout.layer_token_bytes)
    with Remote(NixlEnd, core=0) as active, Remote(NixlEnd, core=1) as passive:
        metadata, pages = passive.call("start", "passive", ucx_tls, *shape, True)
        active.call("start", "active", ucx_tls, *shape, False)
        times: list[float] = active.call("read", metadata, pages, repeats + 1)[1:]  # the first one connects
    return shape[0] * shape[1] / statistics.median(times) / 1e9


def socket_rate(prompt: Prompt, repeats: int) -> float:
    """GB/s of one plain connection over loopback."""
    nbytes, rates = prompt.tokens * prompt.layout.token_bytes, []
    with Remote(SendEnd, core=1) as send:
        config = HandoffConfig(transport="tcp")
        send.call("start", prompt.layout, config, worker_id="p", generation="g", tokens=2048)
        for _ in range(repeats):
            sink = RawSink(LOCAL)
            send.call("blast", LOCAL, sink.port, nbytes)
            rates.append(sink.result())
    return statistics.median(rates)


def handoff_rate(prompt: Prompt, transport: str, ucx_tls: str, codec: str, repeats: int) -> float:
    """GB/s of raw KV from the push of all layers at once until the last one is in the receiver's pages."""
    config = HandoffConfig(transport=transport, ucx_tls=ucx_tls)  # type: ignore[arg-type]
    nbytes, times = prompt.tokens * prompt.layout.token_bytes, []
    with Bench(prompt, config, shaped=False) as bench:
        for repeat in range(repeats + 1):
            exposed_s, _ = bench.hand_over(Way(codec, "exact"), prompt.at_once(), check=repeat == 0)
            times.append(exposed_s)
    return nbytes / statistics.median(times[1:]) / 1e9


# ---- with real workers


def _folder() -> Path:
    """Of the embedded model."""
    config = Config().model
    return hub.resolve(config.id, Path(config.cache_dir).expanduser())


class WorkerEnd:
    """A whole worker, model included."""

    async def start(self, role: str, config: Config) -> tuple[int, str]:
        model = load_model(_folder(), config.model.dtype, 1)
        kind = PrefillWorker if role == "prefill" else DecodeWorker
        self._worker = kind(model, config, worker_id=role, host=LOCAL)
        await self._worker.start()
        return self._worker.port, self._worker.layout.fingerprint


@dataclass(frozen=True, slots=True)
class Split:
    """One prompt through both workers; seconds."""

    prefill_s: float
    encode_s: float
    wire_s: float
    land_s: float
    alone_s: float  # the same prefill where nothing is handed over

    @property
    def exposed_share(self) -> float:
        return (self.encode_s + self.wire_s + self.land_s) / self.prefill_s


class Pair:
    """A prefill and a decode worker on a core each, driven as a router drives them. Use ``with``."""

    def __init__(self, transport: str, ucx_tls: str) -> None:
        pool = PoolConfig(kv_tokens=4096, threads=1, prefix_cache=False)
        config = Config(
            model=ModelConfig(dtype="float32"), prefill=pool, decode=pool,
            handoff=HandoffConfig(transport=transport, ucx_tls=ucx_tls),  # type: ignore[arg-type]
            security=SecurityConfig(allow_unauthenticated=True),
        )  # fmt: skip
        self._remotes = {"prefill": Remote(WorkerEnd, core=1), "decode": Remote(WorkerEnd, core=0)}
        self.ports = {
            role: remote.call("start", role, config, timeout_s=120.0)[0] for role, remote in self._remotes.items()
        }

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        for remote in self._remotes.values():
            remote.end()

    async def split(self, lengths: Sequence[int], codecs: Sequence[str], repeats: int) -> dict[str, dict[str, Any]]:
        """Medians by length and codec."""
        ids = text(_folder(), max(lengths))
        connect = partial(FrameStream.connect, LOCAL, registry=PLANE, timeout_s=10.0)
        result: dict[str, dict[str, Any]] = {}
        async with await connect(self.ports["prefill"]) as prefill, await connect(self.ports["decode"]) as decode:
            for length in lengths:
                for codec in codecs:
                    some = [
                        await self._once(prefill, decode, ids[:length], codec, f"{codec}-{length}-{repeat}")
                        for repeat in range(repeats + 1)
                    ][1:]
                    result[f"{length} {codec}"] = {
                        "prefill_ms": 1e3 * statistics.median(one.prefill_s for one in some),
                        "prefill_alone_ms": 1e3 * statistics.median(one.alone_s for one in some),
                        "encode_ms": 1e3 * statistics.median(one.encode_s for one in some),
                        "wire_ms": 1e3 * statistics.median(one.wire_s for one in some),
                        "land_ms": 1e3 * statistics.median(one.land_s for one in some),
                        "exposed_share": statistics.median(one.exposed_share for one in some),
                    }
        return result

    async def _once(
        self, prefill: FrameStream, decode: FrameStream, ids: tuple[int, ...], codec: str, name: str
    ) -> Split:
        """One request with a handoff, then the same prompt computed by the decode worker alone."""
        sampling = Sampling(temperature=0.0, max_tokens=2)
        work = Work(name, ids, sampling, 0, BUDGET_S)
        decode.send(Reserve(work, 1, codec))
        granted = await _until(decode, Granted)
        prefill.send(Prefill(work, granted.ticket))
        computed = await _until(prefill, Report)
        await _until(prefill, Handed)
        stages = (await _until(decode, Report)).stages
        decode.send(Decode(Work(f"{name}-alone", ids, sampling, 0, BUDGET_S)))
        alone = (await _until(decode, Report)).stages
        await asyncio.sleep(0.1)
        return Split(computed.stages["prefill"], stages["encode"], stages["wire"], stages["land"], alone["prefill"])


async def _until(link: FrameStream, kind: type) -> Any:
    """The next record of ``kind``; raises :class:`Unavailable` when the worker fails."""
    async with asyncio.timeout(BUDGET_S):
        while True:
            record = await link.receive()
            if record is None or isinstance(record, Failed):
                raise Unavailable(f"the worker failed: {record}")
            if isinstance(record, kind):
                return record
