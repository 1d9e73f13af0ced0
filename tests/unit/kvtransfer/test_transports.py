"""One end of a transport against hostile or broken other ends; the rest is in ``test_contract.py``."""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time

import msgpack
import pytest

from baton.errors import ConfigError
from kvtransfer.arena import HostMemory
from kvtransfer.transports import FetchLost, make_exporter, make_fetcher


@pytest.fixture
def landing():
    return HostMemory(4096)


def _ends(transport, landing):
    staged = HostMemory(4096)
    staged.view(0, 4096)[:] = bytes(range(256)) * 16
    exporter = make_exporter(transport, staged, name="p", host="127.0.0.1", ucx_tls="")
    fetcher = make_fetcher(transport, landing, name="d", ucx_tls="")
    yield exporter, fetcher
    exporter.close()
    fetcher.close()


@pytest.fixture(params=["tcp", "loopback"])
def ends(request, landing):
    yield from _ends(request.param, landing)


@pytest.fixture
def tcp_ends(landing):
    yield from _ends("tcp", landing)


def test_a_fetch_copies_exactly_its_range(ends, landing):
    exporter, fetcher = ends
    landing.view(0, 4096)[:] = bytes(4096)
    source = fetcher.connect(exporter.address(), 1.0)
    source.fetch(10, 100, 1000, 1.0)
    assert bytes(landing.view(1000, 100)) == bytes(range(10, 110))
    assert not any(landing.view(0, 1000))
    assert not any(landing.view(1100, 2996))
    source.close()


@pytest.mark.parametrize(("offset", "nbytes"), [(4090, 7), (-1, 4), (0, 0), (1 << 63, 8)])
def test_a_range_outside_the_export_is_refused(ends, offset, nbytes):
    exporter, fetcher = ends
    source = fetcher.connect(exporter.address(), 1.0)
    with pytest.raises(FetchLost, match="outside") as lost:
        source.fetch(offset, nbytes, 0, 1.0)
    assert lost.value.ended is None
    source.close()


def test_an_interrupted_or_orphaned_source_fetches_no_more(ends):
    exporter, fetcher = ends
    interrupted, orphan = (fetcher.connect(exporter.address(), 1.0) for _ in range(2))
    interrupted.interrupt()
    exporter.close()
    for source in (interrupted, orphan):
        with pytest.raises(FetchLost) as lost:
            source.fetch(0, 8, 0, 1.0)
        assert lost.value.ended is None
        source.close()
    with pytest.raises(FetchLost):
        fetcher.connect(exporter.address(), 1.0)


@pytest.mark.parametrize(
    "address", [b"", b"\xc1", b"pigeon", msgpack.packb([1, 2]), msgpack.packb(["127.0.0.1", 0, b"t" * 16, 9]),
                msgpack.packb(["127.0.0.1", 70000, b"t" * 16, 9]), msgpack.packb(["127.0.0.1", 80, b"t", 9]),
                msgpack.packb([None] * 4), msgpack.packb({"a": 1}), msgpack.packb([0] * 100)],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(landing, address):
    with pytest.raises(FetchLost, match="not a tcp address"):
        make_fetcher("tcp", landing, name="d", ucx_tls="").connect(address, 1.0)


def test_a_process_that_merely_got_the_port_serves_nothing(tcp_ends):
    exporter, fetcher = tcp_ends
    host, port, _, exported = msgpack.unpackb(exporter.address())
    stranger = fetcher.connect(msgpack.packb([host, port, b"x" * 16, exported]), 1.0)
    with pytest.raises(FetchLost):
        stranger.fetch(0, 8, 0, 1.0)


def _serve(answer):
    """A tcp exporter that reads the hello and one request, then sends ``answer`` and waits."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def run():
        peer, _ = listener.accept()
        with peer:
            peer.recv(16 + 16, socket.MSG_WAITALL)
            peer.sendall(answer)
            done.wait(5)

    thread = threading.Thread(target=run)
    thread.start()
    address = msgpack.packb(["127.0.0.1", listener.getsockname()[1], b"t" * 16, 4096])

    def end():
        done.set()
        thread.join()
        listener.close()

    return address, end


@pytest.mark.parametrize(
    "answer",
    [struct.pack("<Q", 0), struct.pack("<Q", 1 << 60), struct.pack("<Q", 100) + bytes(50), b"\x01"],
    ids=["refused", "oversized", "short", "stalled"],
)
def test_a_short_oversized_or_stalled_answer_is_lost_and_fenced(landing, answer):
    address, end = _serve(answer)
    source = make_fetcher("tcp", landing, name="d", ucx_tls="").connect(address, 1.0)
    started = time.monotonic()
    with pytest.raises(FetchLost) as lost:
        source.fetch(0, 100, 0, 0.2)
    assert time.monotonic() - started < 1.0
    assert lost.value.ended is None  # closed: nothing can write the landing memory any more
    end()


def test_an_exporter_refuses_ranges_that_a_fetcher_would_not_ask_for(tcp_ends):
    exporter, _ = tcp_ends
    host, port, token, _ = msgpack.unpackb(exporter.address())
    for offset, nbytes in ((4090, 7), (1 << 63, 1 << 63), (0, 0)):
        with socket.create_connection((host, port), timeout=2) as sock:
            sock.sendall(token + struct.pack("<QQ", offset, nbytes))
            assert sock.recv(8, socket.MSG_WAITALL) == bytes(8)


@pytest.mark.parametrize("make", [make_exporter, make_fetcher])
def test_what_cannot_work_here_is_a_configuration_error(make, landing, monkeypatch):
    more = {"host": "127.0.0.1"} if make is make_exporter else {}
    with pytest.raises(ConfigError, match="pigeon"):
        make("pigeon", landing, name="x", ucx_tls="", **more)
    monkeypatch.setitem(sys.modules, "nixl", None)
    with pytest.raises(ConfigError, match="install nixl or choose tcp"):
        make("nixl", landing, name="x", ucx_tls="", **more)
