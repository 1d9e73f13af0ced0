"""Sockets, with TLS if ``handoff.tls`` says so: the exporter serves ranges of its memory, the fetcher receives straight
into the landing memory. A fetch that is given up closes its socket, after which nothing can write the landing range: no
quarantine is needed.

    request   u64 offset, u64 length, MAC
    answer    u64 length, u64 ns that the exporter's thread waited for a processor, the bytes; length 0: refused
"""

from __future__ import annotations

import socket
import ssl
import struct
import time

from baton.config_handoff import TlsConfig
from kvtransfer import processor
from kvtransfer.arena import HostMemory
from kvtransfer.chooser import Speed
from kvtransfer.link_meter import WorkMeter
from kvtransfer.transports import FetchLost, check_range
from kvtransfer.transports.data_port import DataPort, cut, dial, receive, receive_into
from kvtransfer.transports.proof import MAC_BYTES, Proof
from kvtransfer.transports.tls import client_context

_REQUEST = struct.Struct("<QQ")
_ANSWER = struct.Struct("<QQ")
_SEND_S = 60.0  # a reader slower than this for one range is cut off


class TcpExporter:
    """Serves every reader from a thread of its own."""

    def __init__(self, memory: HostMemory, *, host: str, tls: TlsConfig) -> None:
        self._memory = memory
        self._work = WorkMeter()
        self._port = DataPort(self._serve, exported=memory.nbytes, host=host, tls=tls)

    def address(self) -> bytes:
        return self._port.address

    def sending(self) -> Speed | None:
        return self._work.cost()

    def _serve(self, reader: socket.socket, proof: Proof) -> None:
        waited_s = processor.waited_s()
        while True:
            reader.settimeout(None)
            request = receive(reader, _REQUEST.size + MAC_BYTES, None)
            reader.settimeout(_SEND_S)
            before_s, waited_s = waited_s, processor.waited_s()
            offset, nbytes = _REQUEST.unpack(proof.checked(request))
            self._answer(reader, offset, nbytes, int(1e9 * (waited_s - before_s)))

    def _answer(self, reader: socket.socket, offset: int, nbytes: int, waited_ns: int) -> None:
        if nbytes == 0 or offset + nbytes > self._memory.nbytes:
            reader.sendall(_ANSWER.pack(0, waited_ns))
            return
        began_s = time.thread_time()
        if isinstance(reader, ssl.SSLSocket):
            reader.sendall(_ANSWER.pack(nbytes, waited_ns))  # a TLS record of its own: it takes no flags
        else:
            reader.sendall(_ANSWER.pack(nbytes, waited_ns), socket.MSG_MORE)
        reader.sendall(self._memory.view(offset, nbytes))
        self._work.took(nbytes, time.thread_time() - began_s)

    def close(self) -> None:
        self._port.close()


class TcpFetcher:
    def __init__(self, memory: HostMemory, *, tls: TlsConfig) -> None:
        self._memory = memory
        self._tls = client_context(tls) if tls.on else None

    def connect(self, address: bytes, deadline_s: float) -> TcpSource:
        sock, proof, exported = dial(address, transport="tcp", tls=self._tls, deadline_s=deadline_s)
        return TcpSource(sock, proof, self._memory, exported)

    def close(self) -> None:
        pass


class TcpSource:
    def __init__(self, sock: socket.socket, proof: Proof, landing: HostMemory, exported: int) -> None:
        self._sock, self._proof, self._landing, self._exported = sock, proof, landing, exported

    def fetch(self, offset: int, nbytes: int, at: int, deadline_s: float) -> float:
        check_range(offset, nbytes, self._exported)
        deadline = time.monotonic() + deadline_s
        try:
            self._sock.settimeout(deadline_s)
            self._sock.sendall(self._proof.signed(_REQUEST.pack(offset, nbytes)))
            answered, waited_ns = _ANSWER.unpack(receive(self._sock, _ANSWER.size, deadline))
            if answered != nbytes:
                raise ConnectionResetError("the peer refused the range")
            receive_into(self._sock, self._landing.view(at, nbytes), deadline)
        except OSError as error:
            # A stream that stopped mid-answer cannot be used again; closing it is what fences the landing range.
            self._sock.close()
            raise FetchLost(f"tcp fetch of {nbytes} bytes: {error}") from None
        return float(waited_ns) * 1e-9

    def carrier(self) -> str:
        if not isinstance(self._sock, ssl.SSLSocket):
            return "tcp"
        cipher = self._sock.cipher()
        return f"tcp, {self._sock.version()} {cipher[0]}" if cipher else "tcp, TLS ended"

    def interrupt(self) -> None:
        cut(self._sock)

    def close(self) -> None:
        self._sock.close()
