"""Send and receive of a collective library behind the pull contract: gloo between processors, NCCL between GPUs
(docs/adr/0012).

A group of two is formed for every pair of workers when the fetching one connects, and belongs to that connection: its
members never change, and when one dies the group is broken for good. A worker that comes back is a new connection and
so a new group. Requests, refusals and the rendezvous travel on the connection; only the bytes go through the group.

    request   u64 offset, u64 length, u32 ms until the fetcher gives up, MAC
    answer    u64 length or 0: refused, u64 ns that the exporter's thread waited for a processor

A fetch lands in a bounce buffer of the source's own, on the group's device, and is copied from there: no library
promises anything about a receive that was given up, so no landing range is ever given to one. Where that device is a
GPU, staged bytes go through a buffer on the sender's GPU as well.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import time
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from baton.config_handoff import TlsConfig
from baton.errors import ConfigError
from kvtransfer import processor
from kvtransfer.arena import HostMemory
from kvtransfer.chooser import Speed
from kvtransfer.link_meter import WorkMeter
from kvtransfer.transports import FetchLost, check_range
from kvtransfer.transports.data_port import DataPort, cut, dial, receive
from kvtransfer.transports.proof import MAC_BYTES, Proof

log = logging.getLogger(__name__)

_REQUEST = struct.Struct("<QQI")
_ANSWER = struct.Struct("<QQ")
_ENTRY = struct.Struct("<HI")
_MAX_ENTRIES, _MAX_KEY_BYTES, _MAX_VALUE_BYTES = 64, 1024, 64 << 10
EXPORTER, FETCHER = 0, 1  # ranks
FORM_S = 5.0
_MOST_SEND_S = 60.0
PIECE_BYTES = 4 << 20  # most bytes in one message, and what a source keeps to receive one


class _Rendezvous(Store):
    """What two members of a group tell each other to form it, over their connection: no store is left listening."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        super().__init__()
        self._sock, self._deadline = sock, deadline
        self._known: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        encoded, data = key.encode(), value.encode() if isinstance(value, str) else bytes(value)
        self._known[key] = data
        self._sock.sendall(_ENTRY.pack(len(encoded), len(data)) + encoded + data)

    def get(self, key: str) -> bytes:
        while key not in self._known:
            key_bytes, value_bytes = _ENTRY.unpack(receive(self._sock, _ENTRY.size, self._deadline))
            if len(self._known) >= _MAX_ENTRIES or key_bytes > _MAX_KEY_BYTES or value_bytes > _MAX_VALUE_BYTES:
                raise ConnectionAbortedError("the peer's rendezvous is out of bounds")
            name = receive(self._sock, key_bytes, self._deadline).decode()
            self._known[name] = receive(self._sock, value_bytes, self._deadline)
        return self._known[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)


class Group(Protocol):
    """One of two members. A group that raised is broken, and so is one that did not end by a deadline."""

    device: torch.device  # of the tensors, which are uint8 and contiguous

    def lane(self) -> AbstractContextManager[object]:
        """The stream on which the tensors must be ready, for the calling thread."""

    def send(self, data: Tensor, deadline: float) -> None:
        """Returns when the other member has it, or it has left. Raises OSError or RuntimeError."""

    def receive(self, room: Tensor, deadline: float) -> None:
        """Returns when ``room`` is full. Raises OSError or RuntimeError."""

    def close(self) -> None:
        """Ends what is under way here, and tells the other member."""


class Backend(Protocol):
    """Forms groups of two for one worker. Its constructor raises :class:`ConfigError` where it cannot work."""

    name: str

    def form(self, sock: socket.socket, rank: int, deadline_s: float) -> Group:
        """Raises OSError or RuntimeError when the other member is not there or does not keep to the rendezvous."""


class GlooGroup:
    device = torch.device("cpu")

    def __init__(self, group: Any, other: int) -> None:  # torch's annotations of ProcessGroupGloo lack its methods
        self._group, self._other = group, other

    def lane(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def send(self, data: Tensor, deadline: float) -> None:
        self._group.send([data], self._other, 0).wait(_until(deadline))

    def receive(self, room: Tensor, deadline: float) -> None:
        self._group.recv([room], self._other, 0).wait(_until(deadline))

    def close(self) -> None:
        self._group = None  # its sockets close with it


class Gloo:
    """Groups of one local address share one listening socket and one thread of gloo's."""

    name = "gloo"

    def __init__(self) -> None:
        if not dist.is_gloo_available():
            raise ConfigError("this torch has no gloo; choose tcp", field="handoff.transport")
        self._devices: dict[str, Any] = {}

    def form(self, sock: socket.socket, rank: int, deadline_s: float) -> GlooGroup:
        host = str(sock.getsockname()[0])
        device = self._devices.get(host)
        if device is None:
            device = self._devices[host] = dist.ProcessGroupGloo.create_device(hostname=host)
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=deadline_s)
        options._devices = [device]
        store = _Rendezvous(sock, time.monotonic() + deadline_s)
        return GlooGroup(dist.ProcessGroupGloo(store, rank, 2, options), 1 - rank)


class CollectiveExporter:
    """Serves every reader from a thread of its own, in a group of its own."""

    def __init__(self, memory: HostMemory, backend: Backend, *, host: str) -> None:
        self._memory, self._backend = memory, backend
        self._work = WorkMeter()
        self._port = DataPort(self._serve, exported=memory.nbytes, host=host, tls=TlsConfig())

    def address(self) -> bytes:
        return self._port.address

    def sending(self) -> Speed | None:
        return self._work.cost()

    def _serve(self, reader: socket.socket, proof: Proof) -> None:
        waited_s = processor.waited_s()
        with contextlib.ExitStack() as leaving:
            try:
                reader.settimeout(FORM_S)
                group = self._backend.form(reader, EXPORTER, FORM_S)
                leaving.callback(group.close)
                leaving.enter_context(group.lane())
                while True:
                    reader.settimeout(None)
                    request = receive(reader, _REQUEST.size + MAC_BYTES, None)
                    offset, nbytes, limit_ms = _REQUEST.unpack(proof.checked(request))
                    reader.settimeout(_MOST_SEND_S)
                    before_s, waited_s = waited_s, processor.waited_s()
                    limit_s = min(limit_ms / 1000, _MOST_SEND_S)
                    self._answer(reader, group, (offset, nbytes), limit_s, int(1e9 * (waited_s - before_s)))
            except RuntimeError as error:
                log.info("kv export: a group of two over %s is broken: %s", self._backend.name, error)

    def _answer(
        self, reader: socket.socket, group: Group, wanted: tuple[int, int], limit_s: float, waited_ns: int
    ) -> None:
        offset, nbytes = wanted
        if nbytes == 0 or limit_s <= 0 or offset + nbytes > self._memory.nbytes:
            reader.sendall(_ANSWER.pack(0, waited_ns))
            return
        began_s, deadline = time.thread_time(), time.monotonic() + limit_s
        reader.sendall(_ANSWER.pack(nbytes, waited_ns))
        for at in range(offset, offset + nbytes, PIECE_BYTES):
            piece = self._memory.view(at, min(PIECE_BYTES, offset + nbytes - at))
            group.send(torch.frombuffer(piece, dtype=torch.uint8).to(group.device), deadline)  # a CPU's is itself
        self._work.took(nbytes, time.thread_time() - began_s)

    def close(self) -> None:
        self._port.close()


class CollectiveFetcher:
    def __init__(self, memory: HostMemory, backend: Backend) -> None:
        self._memory, self._backend = memory, backend

    def connect(self, address: bytes, deadline_s: float) -> CollectiveSource:
        name = self._backend.name
        sock, proof, exported = dial(address, transport=name, tls=None, deadline_s=deadline_s)
        try:
            group = self._backend.form(sock, FETCHER, deadline_s)
        except (OSError, RuntimeError) as error:
            sock.close()
            raise FetchLost(f"no {name} group of two: {error}") from None
        return CollectiveSource(name, sock, proof, group, self._memory, exported)

    def close(self) -> None:
        pass


class CollectiveSource:
    """``interrupt`` ends a fetch over NCCL at once; one over gloo, which cannot be told to stop waiting, only through
    the peer or at the fetch's own deadline."""

    def __init__(  # noqa: PLR0917  the two ends of one connection
        self, name: str, sock: socket.socket, proof: Proof, group: Group, landing: HostMemory, exported: int
    ) -> None:
        self._name, self._sock, self._proof = name, sock, proof
        self._landing, self._exported = landing, exported
        self._group: Group | None = group
        self._bounce = torch.empty(0, dtype=torch.uint8, device=group.device)

    def fetch(self, offset: int, nbytes: int, at: int, deadline_s: float) -> float:
        check_range(offset, nbytes, self._exported)
        deadline = time.monotonic() + deadline_s
        try:
            if self._group is None:
                raise ConnectionResetError("the group is broken")
            self._sock.settimeout(deadline_s)
            request = _REQUEST.pack(offset, nbytes, min(int(deadline_s * 1000), 1 << 31))
            self._sock.sendall(self._proof.signed(request))
            answered, waited_ns = _ANSWER.unpack(receive(self._sock, _ANSWER.size, deadline))
            if answered != nbytes:
                raise ConnectionResetError("the peer refused the range")
            with self._group.lane():
                for done in range(0, nbytes, PIECE_BYTES):
                    self._piece(self._group, at + done, min(PIECE_BYTES, nbytes - done), deadline)
        except (OSError, RuntimeError) as error:
            self.close()
            raise FetchLost(f"{self._name} fetch of {nbytes} bytes: {error}") from None
        return float(waited_ns) * 1e-9

    def _piece(self, group: Group, at: int, nbytes: int, deadline: float) -> None:
        if len(self._bounce) < nbytes:
            self._bounce = torch.empty(nbytes, dtype=torch.uint8, device=group.device)
        room = self._bounce[:nbytes]
        group.receive(room, deadline)
        torch.frombuffer(self._landing.view(at, nbytes), dtype=torch.uint8).copy_(room)

    def carrier(self) -> str:
        return {"gloo": "gloo over tcp", "nccl": "nccl between GPUs"}[self._name]

    def interrupt(self) -> None:
        cut(self._sock)

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()
        self._sock.close()


def _until(deadline: float) -> timedelta:
    """What is left until ``deadline``; raises TimeoutError, since gloo takes zero for no limit at all."""
    left_s = deadline - time.monotonic()
    if left_s <= 1e-3:
        raise TimeoutError("timed out")
    return timedelta(seconds=left_s)
