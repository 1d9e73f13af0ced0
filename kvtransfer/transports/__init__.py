"""How encoded bytes cross from a sender's staging memory into a receiver's landing memory: always pulled.

The passive side *exports* its staging memory once and hands its address out on the control connection. The active side
opens a :class:`Source` per peer and fetches ranges of it, one blocking call at a time, from its own threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from baton.config_handoff import TlsConfig
from baton.errors import BatonError, ConfigError
from kvtransfer.arena import HostMemory
from kvtransfer.chooser import Speed

if TYPE_CHECKING:  # it imports torch.distributed
    from kvtransfer.transports.collective import Backend


class FetchLost(BatonError):
    """The bytes did not come. ``ended`` is None when nothing can write the landing range any more; otherwise the range
    must be quarantined until ``ended()``, which is cheap and may be called from any thread, returns True."""

    code = "UNAVAILABLE"

    def __init__(self, reason: str, ended: Callable[[], bool] | None = None) -> None:
        super().__init__(reason)
        self.ended = ended


class Exporter(Protocol):
    """The passive side."""

    def address(self) -> bytes:
        """Where a :class:`Fetcher` of the same transport finds this memory."""

    def sending(self) -> Speed | None:
        """Processor seconds that a fetch takes this process, and bytes in one; None where it takes none, or before the
        first, or where a library does it unseen."""

    def close(self) -> None: ...


class Source(Protocol):
    """One peer's exported memory, as the active side sees it. ``fetch`` is for one thread, the rest for any."""

    def fetch(self, offset: int, nbytes: int, at: int, deadline_s: float) -> float:
        """Copies ``nbytes`` from the peer's ``offset`` to ``at`` of the landing memory; raises :class:`FetchLost`.

        Seconds that the peer, as far as it says, waited for a processor since it served the fetch before.
        """

    def carrier(self) -> str:
        """What really moves the bytes ("cma/memory (intra-node, zero-copy)"); before the first fetch maybe less."""

    def interrupt(self) -> None:
        """Makes a fetch under way, and every later one, raise :class:`FetchLost` soon."""

    def close(self) -> None:
        """Lets the peer go; call it when no fetch is under way and no range of it is quarantined."""


class Fetcher(Protocol):
    """The active side."""

    def connect(self, address: bytes, deadline_s: float) -> Source:
        """Raises :class:`FetchLost` when the peer cannot be reached or is not what ``address`` says."""

    def close(self) -> None: ...


def check_range(offset: int, nbytes: int, total: int) -> None:
    """Raises :class:`FetchLost` for a range outside a peer's memory of ``total`` bytes."""
    if not (offset >= 0 and nbytes > 0 and offset + nbytes <= total):
        raise FetchLost(f"range [{offset}, {offset + nbytes}) is outside the peer's {total} bytes")


_NO_TLS = TlsConfig()


def make_exporter(
    transport: str, memory: HostMemory, *, name: str, host: str, ucx_tls: str, tls: TlsConfig = _NO_TLS
) -> Exporter:
    """Exports ``memory``; raises :class:`ConfigError` when the transport cannot work here. Never falls back."""
    match transport:
        case "nixl":
            from kvtransfer.transports.nixl import NixlExporter

            return NixlExporter(memory, name=name, ucx_tls=ucx_tls)
        case "tcp":
            from kvtransfer.transports.tcp import TcpExporter

            return TcpExporter(memory, host=host, tls=tls)
        case "gloo" | "nccl":
            from kvtransfer.transports.collective import CollectiveExporter

            return CollectiveExporter(memory, _backend(transport, last_gpu=True), host=host)
        case "loopback":
            from kvtransfer.transports.loopback import LoopbackExporter

            return LoopbackExporter(memory)
        case _:
            raise ConfigError(f"unknown transport {transport!r}", field="handoff.transport")


def make_fetcher(transport: str, memory: HostMemory, *, name: str, ucx_tls: str, tls: TlsConfig = _NO_TLS) -> Fetcher:
    """A fetcher that lands in ``memory``; raises :class:`ConfigError` when the transport cannot work here."""
    match transport:
        case "nixl":
            from kvtransfer.transports.nixl import NixlFetcher

            return NixlFetcher(memory, name=name, ucx_tls=ucx_tls)
        case "tcp":
            from kvtransfer.transports.tcp import TcpFetcher

            return TcpFetcher(memory, tls=tls)
        case "gloo" | "nccl":
            from kvtransfer.transports.collective import CollectiveFetcher

            return CollectiveFetcher(memory, _backend(transport, last_gpu=False))
        case "loopback":
            from kvtransfer.transports.loopback import LoopbackFetcher

            return LoopbackFetcher(memory)
        case _:
            raise ConfigError(f"unknown transport {transport!r}", field="handoff.transport")


def _backend(transport: str, *, last_gpu: bool) -> Backend:
    """Senders take the last GPU that they see: on one machine, as under the doctor, both ends may see all of them."""
    if transport == "nccl":
        from kvtransfer.transports.nccl import Nccl

        return Nccl(last_gpu=last_gpu)
    from kvtransfer.transports.collective import Gloo

    return Gloo()
