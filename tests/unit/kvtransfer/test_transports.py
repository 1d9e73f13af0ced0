"""One end of a transport against hostile or broken other ends; the rest is in ``test_contract.py``."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time

import msgpack
import pytest
import torch

from baton.config_handoff import TlsConfig
from baton.errors import ConfigError
from kvtransfer.arena import HostMemory
from kvtransfer.transports import FetchLost, make_exporter, make_fetcher, nccl
from kvtransfer.transports.data_port import cut, dial, receive
from kvtransfer.transports.proof import Proof

NIXL_CHILD = """
from baton.config_handoff import TlsConfig
from kvtransfer.arena import HostMemory
from kvtransfer.transports import make_exporter
make_exporter("nixl", HostMemory(4096), name="child", host="127.0.0.1", ucx_tls="", tls=TlsConfig()).close()
print("made")
"""


@pytest.fixture
def landing():
    return HostMemory(4096)


def _exporter(transport, tls):
    staged = HostMemory(4096)
    staged.view(0, 4096)[:] = bytes(range(256)) * 16
    return make_exporter(transport, staged, name="p", host="127.0.0.1", ucx_tls="", tls=tls)


def _ends(name, landing, files):
    transport, tls = name.removesuffix("-tls"), TlsConfig(**files if name.endswith("-tls") else {})
    exporter = _exporter(transport, tls)
    fetcher = make_fetcher(transport, landing, name="d", ucx_tls="", tls=tls)
    yield exporter, fetcher
    exporter.close()
    fetcher.close()


@pytest.fixture(params=["tcp", "tcp-tls", "gloo", "loopback"])
def ends(request, landing, tls):
    yield from _ends(request.param, landing, tls)


@pytest.fixture(params=["tcp", "tcp-tls"])
def tcp_ends(request, landing, tls):
    yield from _ends(request.param, landing, tls)


@pytest.fixture
def plain_ends(landing):
    yield from _ends("tcp", landing, {})


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
    "address", [b"", b"\xc1", b"pigeon", msgpack.packb([1, 2]), msgpack.packb(["127.0.0.1", 0, b"t" * 16, 9, False]),
                msgpack.packb(["127.0.0.1", 70000, b"t" * 16, 9, False]),
                msgpack.packb(["127.0.0.1", 80, b"t", 9, False]), msgpack.packb(["127.0.0.1", 80, b"t" * 16, 9, 1]),
                msgpack.packb([None] * 5), msgpack.packb({"a": 1}),
                msgpack.packb([0] * 100)],
)  # fmt: skip
@pytest.mark.parametrize("transport", ["tcp", "gloo"])
def test_an_address_that_is_none_is_refused(landing, transport, address):
    with pytest.raises(FetchLost, match=f"not a {transport} address"):
        make_fetcher(transport, landing, name="d", ucx_tls="").connect(address, 1.0)


@pytest.mark.parametrize("change", [{2: b"x" * 16}, {3: 4097}], ids=["token", "size"])
def test_a_process_that_merely_got_the_port_is_not_connected_to(tcp_ends, change):
    exporter, fetcher = tcp_ends
    address = dict(enumerate(msgpack.unpackb(exporter.address()))) | change
    with pytest.raises(FetchLost, match="did not welcome"):
        fetcher.connect(msgpack.packb(list(address.values())), 1.0)


def _serve(answer):
    """A tcp exporter that knows the token and reads one request, then sends ``answer`` and waits."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def run():
        peer, _ = listener.accept()
        with peer:
            peer.sendall(bytes(16))
            proof = Proof(b"t" * 16, bytes(16), receive(peer, 16, None))
            receive(peer, 16, None)
            peer.sendall(proof.of_exporter + struct.pack("<Q", 4096))
            receive(peer, 32, None)
            peer.sendall(answer)
            done.wait(5)

    thread = threading.Thread(target=run)
    thread.start()
    address = msgpack.packb(["127.0.0.1", listener.getsockname()[1], b"t" * 16, 4096, False])

    def end():
        done.set()
        thread.join()
        listener.close()

    return address, end


@pytest.mark.parametrize(
    "answer",
    [struct.pack("<QQ", 0, 0), struct.pack("<QQ", 1 << 60, 0), struct.pack("<QQ", 100, 0) + bytes(50), b"\x01"],
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


def _dialled(exporter, transport="tcp"):
    sock, proof, _ = dial(exporter.address(), transport=transport, tls=None, deadline_s=2.0)
    return sock, proof


def test_an_exporter_refuses_ranges_that_a_fetcher_would_not_ask_for(plain_ends):
    exporter, _ = plain_ends
    for offset, nbytes in ((4090, 7), (1 << 63, 1 << 63), (0, 0)):
        sock, proof = _dialled(exporter)
        with sock:
            sock.sendall(proof.signed(struct.pack("<QQ", offset, nbytes)))
            assert receive(sock, 16, None)[:8] == bytes(8)


def test_the_token_never_crosses_the_data_connection_and_what_did_opens_no_other(plain_ends):
    """Somebody overhears a whole conversation, and says it again."""
    exporter, fetcher = plain_ends
    host, port, token, exported, tls = msgpack.unpackb(exporter.address())
    said = {"reader": b"", "exporter": b""}
    listener = socket.create_server(("127.0.0.1", 0))

    def relay():
        near, _ = listener.accept()
        with near, socket.create_connection((host, port)) as far:

            def pass_on(source, target, name):
                with contextlib.suppress(OSError):
                    while data := source.recv(65536):
                        said[name] += data
                        target.sendall(data)

            back = threading.Thread(target=pass_on, args=(far, near, "exporter"))
            back.start()
            pass_on(near, far, "reader")
            far.shutdown(socket.SHUT_RDWR)
            back.join()

    thread = threading.Thread(target=relay)
    thread.start()
    source = fetcher.connect(msgpack.packb([host, listener.getsockname()[1], token, exported, tls]), 2.0)
    source.fetch(0, 64, 0, 2.0)
    source.close()
    thread.join()
    listener.close()
    assert bytes(range(64)) in said["exporter"]  # without TLS, KV can be overheard
    assert token not in said["reader"] + said["exporter"]
    with socket.create_connection((host, port), timeout=2) as again:
        again.sendall(said["reader"])
        assert len(receive(again, 16, None)) == 16  # its challenge
        with contextlib.suppress(ConnectionResetError):
            assert again.recv(1) == b""


@pytest.mark.parametrize("harm", ["unsigned", "other range", "repeated"])
def test_a_request_that_the_reader_did_not_make_ends_the_connection(plain_ends, harm):
    exporter, _ = plain_ends
    sock, proof = _dialled(exporter)
    with sock:
        first = proof.signed(struct.pack("<QQ", 0, 8))
        if harm == "repeated":
            sock.sendall(first)
            said = receive(sock, 24, None)
            assert said[:8] + said[16:] == struct.pack("<Q", 8) + bytes(range(8))
        forged = {"unsigned": first[:16] + bytes(16), "other range": struct.pack("<QQ", 64, 8) + first[16:]}
        sock.sendall(forged.get(harm, first))
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""


def test_an_exporter_that_does_not_know_the_token_is_not_read(landing):
    listener = socket.create_server(("127.0.0.1", 0))

    def pretend():
        peer, _ = listener.accept()
        with peer:
            peer.sendall(bytes(16))
            receive(peer, 32, None)
            peer.sendall(bytes(16) + struct.pack("<Q", 4096))

    thread = threading.Thread(target=pretend)
    thread.start()
    address = msgpack.packb(["127.0.0.1", listener.getsockname()[1], b"t" * 16, 4096, False])
    with pytest.raises(FetchLost, match="proof was not made with the token"):
        make_fetcher("tcp", landing, name="d", ucx_tls="").connect(address, 2.0)
    thread.join()
    listener.close()


@pytest.mark.parametrize(
    "rendezvous",
    [b"", struct.pack("<HI", 1, 1 << 31), struct.pack("<HI", 2000, 1), b"".join(
        struct.pack("<HI", 2, 1) + f"{i:02}".encode() + b"v" for i in range(70))],
    ids=["silence", "long value", "long key", "many entries"],
)  # fmt: skip
def test_a_group_that_is_not_formed_by_the_rules_is_given_up(landing, rendezvous, monkeypatch):
    """The exporting member drops whoever floods it, and one that is silent when the time for forming is over."""
    monkeypatch.setattr("kvtransfer.transports.collective.FORM_S", 1.0)
    exporter = _exporter("gloo", TlsConfig())
    sock, _ = _dialled(exporter, "gloo")
    with sock:
        sock.settimeout(8)
        sock.sendall(rendezvous)
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(4096):
                pass
    source = make_fetcher("gloo", landing, name="d", ucx_tls="").connect(exporter.address(), 5.0)  # others are served
    source.fetch(0, 4096, 0, 5.0)
    source.close()
    exporter.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_nccl_without_a_gpu_says_which_field_to_change(landing):
    with pytest.raises(ConfigError, match="joins GPUs") as refused:
        make_fetcher("nccl", landing, name="d", ucx_tls="")
    assert refused.value.field == "handoff.transport"


@pytest.mark.parametrize("other", [b"A" * 16, b"B" * 16])
def test_two_members_on_one_gpu_are_refused(other):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(other)
        expect = pytest.raises(ConnectionRefusedError, match=r"handoff\.transport")
        with expect if other == b"A" * 16 else contextlib.nullcontext():
            nccl.meet(ours, b"A" * 16, time.monotonic() + 1.0)
        assert theirs.recv(16) == b"A" * 16


@pytest.mark.parametrize("end", ["theirs", "ours", "nobody's"])
def test_waiting_for_nccl_ends_with_the_connection_or_at_the_deadline(end):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        nccl.until(lambda: True, ours, 0.0)
        theirs.sendall(b"not a hang-up")
        begun = time.monotonic()
        leave = threading.Timer(0.1, {"theirs": theirs.close, "ours": lambda: cut(ours)}.get(end, lambda: None))
        leave.start()
        with pytest.raises(TimeoutError if end == "nobody's" else ConnectionResetError):
            nccl.until(lambda: False, ours, begun + 0.5)
        assert 0.1 <= time.monotonic() - begun < (0.4 if end != "nobody's" else 0.8)
        leave.join()


def test_both_ends_of_a_tls_connection_must_know_the_authority(landing, tls, stranger):
    theirs = TlsConfig(**stranger.files("stranger"))
    ours = TlsConfig(**tls)
    mixed = TlsConfig(**(stranger.files("halfway") | {"ca": tls["ca"]}))  # trusts us, but nobody signed it for us
    for serving, fetching, reason in (
        (ours, theirs, "did not welcome"),
        (theirs, ours, "did not welcome"),
        (ours, mixed, "did not welcome"),
        (ours, TlsConfig(), "speaks TLS, this worker plain tcp"),
        (TlsConfig(), ours, "speaks plain tcp, this worker TLS"),
    ):
        exporter = _exporter("tcp", serving)
        with pytest.raises(FetchLost, match=reason):
            make_fetcher("tcp", landing, name="d", ucx_tls="", tls=fetching).connect(exporter.address(), 2.0)
        exporter.close()


def test_nobody_reads_a_tls_connection_in_the_clear(landing, tls):
    exporter = _exporter("tcp", TlsConfig(**tls))
    host, port, token, *_ = msgpack.unpackb(exporter.address())
    with socket.create_connection((host, port), timeout=2) as sock:  # knows the token, speaks no TLS
        sock.sendall(token + struct.pack("<QQ", 0, 100))
        try:
            answer = sock.recv(4096)
        except ConnectionResetError:
            answer = b""
        assert bytes(range(16)) not in answer
    exporter.close()


@pytest.mark.parametrize(
    ("field", "text", "reason"),
    [
        ("cert", None, "handoff.tls.cert: cannot read"),
        ("key", None, "handoff.tls.key: cannot read"),
        ("ca", None, "handoff.tls.ca: cannot read"),
        ("ca", "no certificate", "handoff.tls.ca: .* holds no certificates"),
        ("key", "no key", "handoff.tls.cert: .* does not fit"),
    ],
)
def test_tls_files_that_do_not_fit_are_named(tls, tmp_path, field, text, reason):
    landing, path = HostMemory(64), tmp_path / "file"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    wrong = TlsConfig(**(tls | {field: str(path)}))
    with pytest.raises(ConfigError, match=reason):
        make_fetcher("tcp", landing, name="d", ucx_tls="", tls=wrong)
    with pytest.raises(ConfigError, match=reason):
        make_exporter("tcp", landing, name="d", host="127.0.0.1", ucx_tls="", tls=wrong)


@pytest.mark.parametrize("make", [make_exporter, make_fetcher])
def test_what_cannot_work_here_is_a_configuration_error(make, landing, monkeypatch):
    more = {"host": "127.0.0.1"} if make is make_exporter else {}
    with pytest.raises(ConfigError, match="pigeon"):
        make("pigeon", landing, name="x", ucx_tls="", **more)
    monkeypatch.setitem(sys.modules, "nixl", None)
    with pytest.raises(ConfigError, match="install nixl or choose tcp"):
        make("nixl", landing, name="x", ucx_tls="", **more)


def test_a_child_of_a_process_with_nixl_can_use_nixl_too(landing):
    """UCX writes into a descriptor of this process; a child that were told so has no such file, and dies of it."""
    before = dict(os.environ)
    exporter = make_exporter("nixl", landing, name="parent", host="127.0.0.1", ucx_tls="", tls=TlsConfig())
    try:
        assert dict(os.environ) == before
        ran = subprocess.run(
            [sys.executable, "-c", NIXL_CHILD], check=False, capture_output=True, text=True, timeout=60.0
        )
    finally:
        exporter.close()
    assert (ran.returncode, ran.stdout.strip()) == (0, "made"), ran.stderr
