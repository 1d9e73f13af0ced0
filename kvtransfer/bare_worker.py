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

from baton.config_handoff import HandoffConfig
from baton.errors import BatonError
from baton.frames import FrameStream
from baton.guard import Guard
from baton.layout import KVLayout
from baton.messages import Cancel, Hello, Inspect, Load, Probe
from baton.plane import PlaneServer, broke
from baton.secure import ClusterKey
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
    key: str  # made for this pair alone

    def line(self) -> str:
        tree = {"role": self.role, "layout": asdict(self.layout), "handoff": self.handoff.model_dump(), "key": self.key}
        return json.dumps(tree)

    @classmethod
    def read(cls, line: str) -> Order:
        tree = json.loads(line)
        return cls(tree["role"], KVLayout(**tree["layout"]), HandoffConfig(**tree["handoff"]), tree["key"])


class BareWorker:
    """The handler of one token plane; holds a sender or a receiver with the buffers of the configuration."""

    def __init__(self, order: Order) -> None:
        name, generation = f"bare-{order.role}", secrets.token_hex(8)
        guard = self._guard = Guard(ClusterKey(order.key))
        self._end = _end(order, guard, name, generation)
        self._tasks = Jobs(broke)
        self._probes = Probes(
            order.layout, order.handoff, worker_id=name, host=HOST, load=self.load, own=self._end, key=guard.key
        )
        hello = Hello(order.role, name, generation, order.layout.family, order.layout.dtype)
        self._plane = PlaneServer(self, hello, host=HOST, guard=guard)

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
            held = (sent.handoffs, sent.staging_bytes_used, sent.staging_bytes_total, 0)
        else:
            got = self._end.stats()
            held = (got.leases, got.landing_bytes_used, got.landing_bytes_total, got.quarantined_bytes)
        return Load(0, 0, 0, 0, 0, *held, connections_refused=self._guard.refused)


def _end(order: Order, guard: Guard, worker_id: str, generation: str) -> Sender | Receiver:
    layout, handoff = order.layout, order.handoff
    if order.role == "prefill":
        return Sender(layout, handoff, host=HOST, key=guard.key, worker_id=worker_id, generation=generation)
    return Receiver(layout, handoff, host=HOST, guard=guard, worker_id=worker_id, generation=generation)


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
