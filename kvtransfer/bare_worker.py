"""A worker without a model: one end of a handoff in a process of its own, for ``baton doctor`` where no cluster runs.

Reads one line of JSON from standard input (role, layout, the handoff's configuration), answers one line with its port,
and serves probes until standard input ends. It says Hello like every worker, so the doctor asks both kinds alike.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import sys
from dataclasses import asdict, dataclass
from typing import Any

from baton.config import HandoffConfig
from baton.errors import BatonError
from baton.frames import FrameStream
from baton.layout import KVLayout
from baton.messages import Cancel, Hello, Inspect, Load, Probe
from baton.plane import PlaneServer
from baton.tasks import Jobs
from kvtransfer.probe import Probes
from kvtransfer.receiver import Receiver
from kvtransfer.sender import Sender

log = logging.getLogger(__name__)

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Order:
    """What the process is to be; travels as one line of JSON."""

    role: str  # "prefill" sends, "decode" lands
    layout: KVLayout
    handoff: HandoffConfig

    def line(self) -> str:
        return json.dumps({"role": self.role, "layout": asdict(self.layout), "handoff": self.handoff.model_dump()})

    @classmethod
    def read(cls, line: str) -> Order:
        tree = json.loads(line)
        return cls(tree["role"], KVLayout(**tree["layout"]), HandoffConfig(**tree["handoff"]))


class BareWorker:
    """The handler of one token plane; holds a sender or a receiver with the buffers of the configuration."""

    def __init__(self, order: Order) -> None:
        name, generation = f"bare-{order.role}", secrets.token_hex(8)
        end = Sender if order.role == "prefill" else Receiver
        self._end: Sender | Receiver = end(
            order.layout, order.handoff, host=HOST, worker_id=name, generation=generation
        )
        self._tasks = Jobs()
        self._probes = Probes(order.layout, order.handoff, worker_id=name, host=HOST, load=self.load, own=self._end)
        hello = Hello(order.role, name, generation, order.layout.fingerprint, order.layout.dtype)
        self._plane = PlaneServer(self, hello, host=HOST)

    async def start(self) -> int:
        """The port on which it listens. Raises :class:`baton.errors.ConfigError`."""
        await self._end.start()
        await self._plane.start()
        return self._plane.port

    async def close(self) -> None:
        await self._plane.close()
        await self._tasks.close()
        await self._end.close()

    def received(self, link: FrameStream, record: object) -> None:
        match record:
            case Inspect() | Probe():
                self._tasks.start(link, record.request_id, lambda: self._probes.serve(link, record))
            case Cancel():
                self._tasks.cancel(link, record.request_id)
            case _:
                log.warning("%s sent %s to a bare worker; ignored", link.peer, type(record).__name__)

    def gone(self, link: FrameStream) -> None:
        self._tasks.cancel_all(link)

    def load(self) -> Load:
        if isinstance(self._end, Sender):
            sent = self._end.stats()
            return Load(0, 0, 0, 0, 0, sent.handoffs, sent.staging_bytes_used, sent.staging_bytes_total, 0)
        held = self._end.stats()
        return Load(
            0, 0, 0, 0, 0, held.leases, held.landing_bytes_used, held.landing_bytes_total, held.quarantined_bytes
        )


async def _serve(line: str) -> int:
    try:
        worker = BareWorker(Order.read(line))
        port = await worker.start()
    except BatonError as error:
        _say(error=error.message, field=error.field)
        return 1
    _say(port=port)
    await asyncio.to_thread(sys.stdin.read)  # until whoever started this process closes it
    await worker.close()
    return 0


def _say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


if __name__ == "__main__":
    sys.exit(asyncio.run(_serve(sys.stdin.readline())))
