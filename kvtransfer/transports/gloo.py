"""Send and receive of a collective library (torch.distributed's gloo) behind the pull contract (docs/adr/0010).

A group of two is formed for every pair of workers when the fetching one connects, and belongs to that connection: its
members never change, and when one dies the group is broken for good. A worker that comes back is a new connection and
so a new group. Requests, refusals and the rendezvous travel on the connection; only the bytes go through the group.

    request   u64 offset, u64 length, u32 ms until the fetcher gives up, MAC     answer   u64 length or 0: refused

A fetch lands in memory of the source's own and is copied from there: the library promises nothing about a receive that
timed out, so no landing range is ever given to it.
"""

from __future__ import annotations

import logging
import socket
import struct
import time
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from baton.config_handoff import TlsConfig
from baton.errors import ConfigError
from kvtransfer.arena import HostMemory
from kvtransfer.transports import FetchLost, check_range
from kvtransfer.transports.data_port import DataPort, cut, dial, receive
from kvtransfer.transports.proof import MAC_BYTES, Proof

log = logging.getLogger(__name__)

_REQUEST = struct.Struct("<QQI")
_ANSWER = struct.Struct("<Q")
_ENTRY = struct.Struct("<HI")
_MAX_ENTRIES, _MAX_KEY_BYTES, _MAX_VALUE_BYTES = 64, 1024, 64 << 10
_EXPORTER, _FETCHER = 0, 1  # ranks
_FORM_S = 5.0
_MOST_SEND_S = 60.0
_PIECE_BYTES = 4 << 20  # most bytes in one message, and what a source keeps to receive them


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


class _Group(Protocol):
    """What is used of ``ProcessGroupGloo``, whose annotations lack it."""

    def send(self, tensors: list[Tensor], to: int, tag: int) -> dist.Work: ...
    def recv(self, tensors: list[Tensor], source: int, tag: int) -> dist.Work: ...


class _Groups:
    """Forms groups of two; those of one local address share one listening socket and one thread of gloo's."""

    def __init__(self) -> None:
        if not dist.is_gloo_available():
            raise ConfigError("this torch has no gloo; choose tcp", field="handoff.transport")
        self._devices: dict[str, Any] = {}

    def form(self, sock: socket.socket, rank: int, deadline_s: float) -> _Group:
        """Raises OSError or RuntimeError when the other member is not there or does not keep to the rendezvous."""
        host = str(sock.getsockname()[0])
        device = self._devices.get(host)
        if device is None:
            device = self._devices[host] = dist.ProcessGroupGloo.create_device(hostname=host)
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=deadline_s)
        options._devices = [device]
        group: Any = dist.ProcessGroupGloo(_Rendezvous(sock, time.monotonic() + deadline_s), rank, 2, options)
        return cast(_Group, group)


class GlooExporter:
    """Serves every reader from a thread of its own, in a group of its own."""

    def __init__(self, memory: HostMemory, *, host: str) -> None:
        self._memory = memory
        self._groups = _Groups()
        self._port = DataPort(self._serve, exported=memory.nbytes, host=host, tls=TlsConfig())

    def address(self) -> bytes:
        return self._port.address

    def _serve(self, reader: socket.socket, proof: Proof) -> None:
        try:
            reader.settimeout(_FORM_S)
            group = self._groups.form(reader, _EXPORTER, _FORM_S)
            while True:
                reader.settimeout(None)
                request = receive(reader, _REQUEST.size + MAC_BYTES, None)
                offset, nbytes, limit_ms = _REQUEST.unpack(proof.checked(request))
                reader.settimeout(_MOST_SEND_S)
                self._answer(reader, group, offset, nbytes, min(limit_ms / 1000, _MOST_SEND_S))
        except RuntimeError as error:
            log.info("kv export: a gloo group of two is broken: %s", error)

    def _answer(self, reader: socket.socket, group: _Group, offset: int, nbytes: int, limit_s: float) -> None:
        if nbytes == 0 or limit_s <= 0 or offset + nbytes > self._memory.nbytes:
            reader.sendall(_ANSWER.pack(0))
            return
        reader.sendall(_ANSWER.pack(nbytes))
        deadline = time.monotonic() + limit_s
        for at in range(offset, offset + nbytes, _PIECE_BYTES):
            piece = self._memory.view(at, min(_PIECE_BYTES, offset + nbytes - at))
            group.send([torch.frombuffer(piece, dtype=torch.uint8)], _FETCHER, 0).wait(_until(deadline))

    def close(self) -> None:
        self._port.close()


class GlooFetcher:
    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._groups = _Groups()

    def connect(self, address: bytes, deadline_s: float) -> GlooSource:
        sock, proof, exported = dial(address, transport="gloo", tls=None, deadline_s=deadline_s)
        try:
            group = self._groups.form(sock, _FETCHER, deadline_s)
        except (OSError, RuntimeError) as error:
            sock.close()
            raise FetchLost(f"no gloo group of two: {error}") from None
        return GlooSource(sock, proof, group, self._memory, exported)

    def close(self) -> None:
        pass


class GlooSource:
    """``interrupt`` reaches a fetch under way only through the peer or through the fetch's own deadline: gloo cannot
    be told to stop waiting."""

    def __init__(self, sock: socket.socket, proof: Proof, group: _Group, landing: HostMemory, exported: int) -> None:
        self._sock, self._proof, self._landing, self._exported = sock, proof, landing, exported
        self._group: _Group | None = group
        self._room = torch.empty(0, dtype=torch.uint8)

    def fetch(self, offset: int, nbytes: int, at: int, deadline_s: float) -> None:
        check_range(offset, nbytes, self._exported)
        deadline = time.monotonic() + deadline_s
        try:
            self._sock.settimeout(deadline_s)
            request = _REQUEST.pack(offset, nbytes, min(int(deadline_s * 1000), 1 << 31))
            self._sock.sendall(self._proof.signed(request))
            if _ANSWER.unpack(receive(self._sock, _ANSWER.size, deadline))[0] != nbytes:
                raise ConnectionResetError("the peer refused the range")
            for done in range(0, nbytes, _PIECE_BYTES):
                self._piece(at + done, min(_PIECE_BYTES, nbytes - done), deadline)
        except (OSError, RuntimeError) as error:
            self.close()
            raise FetchLost(f"gloo fetch of {nbytes} bytes: {error}") from None

    def _piece(self, at: int, nbytes: int, deadline: float) -> None:
        if self._group is None:
            raise ConnectionResetError("the group is broken")
        if len(self._room) < nbytes:
            self._room = torch.empty(nbytes, dtype=torch.uint8)
        room = self._room[:nbytes]
        self._group.recv([room], _EXPORTER, 0).wait(_until(deadline))
        self._landing.view(at, nbytes)[:] = room.numpy().data

    def carrier(self) -> str:
        return "gloo over tcp"

    def interrupt(self) -> None:
        cut(self._sock)

    def close(self) -> None:
        self._sock.close()
        self._group = None  # its sockets close with it, which tells the peer


def _until(deadline: float) -> timedelta:
    """What is left until ``deadline``; raises TimeoutError, since gloo takes zero for no limit at all."""
    left_s = deadline - time.monotonic()
    if left_s <= 1e-3:
        raise TimeoutError("timed out")
    return timedelta(seconds=left_s)
