"""The open loop itself: requests leave when they are due, whatever became of the earlier ones."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from baton.wire import inference_pb2 as pb
from baton.wire import inference_pb2_grpc
from bench.stats import OK, Record
from bench.workload import Planned

CUT_OFF = "CUT_OFF"  # ended by our own interrupt, not by the service


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, ready to be sent."""

    planned: Planned
    request: pb.GenerateRequest


class Target:
    """Connections to one endpoint. Several, because a server bounds the streams of each. Use with ``async with``."""

    def __init__(self, address: str, channels: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 << 20)]
        self._channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(channels)]
        self._stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in self._channels]

    def stub(self, index: int) -> Any:
        return self._stubs[index % len(self._stubs)]

    async def connect(self, timeout_s: float) -> None:
        """Raises TimeoutError when the endpoint does not answer."""
        async with asyncio.timeout(timeout_s):
            for channel in self._channels:
                await channel.channel_ready()

    async def __aenter__(self) -> Target:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for channel in self._channels:
            await channel.close()


async def run(
    target: Target,
    asks: Sequence[Ask],
    *,
    timeout_s: float,
    stop: asyncio.Event,
    progress: Callable[[int, int], None],
) -> list[Record]:
    """Sends every request when it is due and returns what became of each, in order.

    After ``stop`` is set nothing more is sent and what runs is cancelled; those records have status ``CUT_OFF``.
    ``progress(sent, ended)`` is told of every change.
    """
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    tasks: list[asyncio.Task[Record]] = []
    ended = 0

    def note_end(task: asyncio.Task[Record]) -> None:
        nonlocal ended
        ended += 1
        progress(len(tasks), ended)

    for index, ask in enumerate(asks):
        if await _set_within(stop, start_s + ask.planned.at_s - loop.time()):
            break
        task = asyncio.create_task(_one(target.stub(index), index, ask, start_s, timeout_s))
        tasks.append(task)
        task.add_done_callback(note_end)
        progress(len(tasks), ended)
    stopping = asyncio.create_task(stop.wait())
    finished = asyncio.gather(*tasks)
    waited: set[asyncio.Future[Any]] = {stopping, finished}
    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    for task in tasks:
        task.cancel()
    return list(await finished)


async def _set_within(event: asyncio.Event, timeout_s: float) -> bool:
    """True as soon as ``event`` is set, False when ``timeout_s`` has passed."""
    if timeout_s > 0.0:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await event.wait()
    return event.is_set()


async def _one(stub: Any, index: int, ask: Ask, start_s: float, timeout_s: float) -> Record:
    now = asyncio.get_running_loop().time
    planned, times = ask.planned, list[float]()
    sent_s = now() - start_s
    status, message, reason, ledger = OK, "", "", pb.StageLedger()
    call = stub.Generate(ask.request, timeout=timeout_s)
    try:
        async for response in call:
            times += [now() - start_s] * len(response.token_ids)
            if response.finish_reason:
                ledger = response.ledger
    except grpc.aio.AioRpcError as error:
        status, message, reason = error.code().name, error.details() or "", _reason(error)
    except asyncio.CancelledError:
        status = CUT_OFF
    finally:
        ended_s = now() - start_s
        call.cancel()
    return Record(
        index=index,
        due_s=planned.at_s,
        sent_s=sent_s,
        prompt_tokens=planned.prompt_tokens,
        output_tokens=planned.output_tokens,
        status=status,
        message=message,
        token_times_s=tuple(times),
        stages={stage.name: stage.seconds for stage in ledger.stages},
        transfer_busy_s=ledger.transfer_busy_s,
        transfer_exposed_s=ledger.transfer_exposed_s,
        transfer_bytes=ledger.transfer_bytes,
        ended_s=ended_s,
        reason=reason,
    )


def _reason(error: grpc.aio.AioRpcError) -> str:
    """What the service says was the reason; empty where it says none."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return str(info.reason)
    return ""
