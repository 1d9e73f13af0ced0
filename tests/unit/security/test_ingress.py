"""The ingress: Ray's own HAProxy configuration, hardened, run by the real HAProxy, and attacked."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from baton.config import parse
from baton.errors import ConfigError
from deploy import ingress

if TYPE_CHECKING:
    from tests.conftest import Signed
    from tests.unit.security.conftest import Front, StartFront

HOST = "127.0.0.1"
QUICK = {"header_s": 1.0, "body_s": 1.5, "idle_s": 1.0}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # and empty settings
OPENING = b"\x83\x86\x44\x1c/baton.v1.Inference/Generate\x41\x01x"  # POST, http, path, authority


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def said_after(port: int, parts: Sequence[bytes], pause_s: float, limit_s: float = 8.0) -> tuple[float, bytes]:
    """Seconds until the server cut the connection on which ``parts`` were sent with pauses, and what it had said."""
    began, heard = time.monotonic(), b""
    left = iter(parts)
    with socket.create_connection((HOST, port)) as sock:
        sock.settimeout(pause_s)
        while time.monotonic() - began < limit_s:
            try:
                if part := next(left, b""):
                    sock.sendall(part)
                got = sock.recv(65536)
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                break
            if not got:
                break
            heard += got
    return time.monotonic() - began, heard


def ask(front: Front, body: bytes = b"hello", path: str = "/", tls: ssl.SSLContext | None = None) -> bytes:
    """An honest client of HTTP."""
    where = (HOST, front.http_port)
    connection = http.client.HTTPSConnection(*where, timeout=10, context=tls) if tls else None
    with contextlib.closing(connection or http.client.HTTPConnection(*where, timeout=10)) as asked:
        asked.request("POST", path, body=body)
        return asked.getresponse().read()


def call(channel: grpc.Channel, body: bytes = b"hello") -> list[bytes]:
    """An honest client of gRPC."""
    with channel:
        return list(channel.unary_stream("/baton.v1.Inference/Generate")(body, timeout=10))


ATTACKS: dict[str, tuple[str, list[bytes]]] = {
    "silence": ("http", []),
    "slow headers": ("http", [b"GET / HTTP/1.1\r\n", *[b"a: b\r\n"] * 99]),
    "slow body": ("http", [b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 999\r\n\r\n", *[b"a"] * 99]),
    "slow chunks": (
        "http",
        [b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n", *[b"1\r\na\r\n"] * 99],
    ),
    "large header": ("http", [b"GET / HTTP/1.1\r\nhost: x\r\nbomb: " + b"a" * 100_000]),
    "many headers": ("http", [b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000]),
    "idle after an answer": ("http", [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"]),
    "grpc silence": ("grpc", []),
    "grpc idle": ("grpc", [PREFACE]),
    "grpc pings": ("grpc", [PREFACE, *[frame(6, 0, 0, b"12345678")] * 99]),
    "grpc slow headers": ("grpc", [PREFACE, frame(1, 0, 1, OPENING), *[frame(9, 0, 1, b"\x83")] * 99]),
    "grpc header flood": ("grpc", [PREFACE, frame(1, 0, 1, OPENING), *[frame(9, 0, 1, b"\x83" * 16384)] * 99]),
    "grpc slow message": ("grpc", [PREFACE, frame(1, 4, 1, OPENING), *[frame(0, 0, 1, b"a")] * 99]),
    "grpc settings flood": ("grpc", [PREFACE, *[frame(4, 0, 0, b"") * 1000] * 30]),
}


def test_attackers_are_cut_while_others_are_served(start_front: StartFront) -> None:
    """Thirty connections of each kind at once, and honest clients between them."""
    from concurrent.futures import ThreadPoolExecutor

    each = 30
    with start_front(**QUICK) as front, ThreadPoolExecutor(each * len(ATTACKS)) as crowd:
        ports = {"http": front.http_port, "grpc": front.grpc_port}
        attacks = {
            name: [crowd.submit(said_after, ports[kind], parts, 0.2) for _ in range(each)]
            for name, (kind, parts) in ATTACKS.items()
        }
        waits = []
        while not all(attack.done() for group in attacks.values() for attack in group):
            began = time.monotonic()
            assert ask(front) == b"hello"
            assert call(front.grpc()) == [b"hello", b"hello"]
            waits.append(time.monotonic() - began)
        lasted = {name: max(attack.result()[0] for attack in group) for name, group in attacks.items()}
        late = {name: round(seconds, 1) for name, seconds in lasted.items() if seconds > 6.0}
        assert not late, "cut too late"
        assert len(waits) >= 3
        assert max(waits) < 3.0
        assert front.process.poll() is None


def test_answers_that_take_longer_than_any_limit_are_not_cut(start_front: StartFront) -> None:
    with start_front(**QUICK) as front:
        assert ask(front, path="/late") == b"hello"
        assert call(front.grpc(), b"late") == [b"late", b"late"]


def test_one_address_cannot_take_all_connections(start_front: StartFront) -> None:
    with start_front(connections_per_address=5) as front:
        with contextlib.ExitStack() as held:
            for _ in range(5):
                held.enter_context(socket.create_connection((HOST, front.http_port)))
            time.sleep(0.2)
            with pytest.raises((ConnectionError, http.client.HTTPException)):
                ask(front)
            assert call(front.grpc()) == [b"hello", b"hello"], "each endpoint counts for itself"
        deadline_s = time.monotonic() + 5.0
        while True:
            try:
                assert ask(front) == b"hello"
                break
            except (ConnectionError, http.client.HTTPException):
                assert time.monotonic() < deadline_s
                time.sleep(0.05)


def test_calls_carry_the_passage_and_nobody_can_forge_it(start_front: StartFront) -> None:
    for passage in ("0123abcd", ""):
        with start_front(passage) as front:
            said_after(front.http_port, [b"GET / HTTP/1.1\r\nhost: x\r\nX-Baton-Front: forged\r\n\r\n"], 0.2, 2.0)
            with front.grpc() as channel:
                generate = channel.unary_stream("/baton.v1.Inference/Generate")
                assert list(generate(b"x", metadata=((ingress.FRONT_HEADER, "forged"),), timeout=10)) == [b"x", b"x"]
            assert front.seen == [passage, passage]


@pytest.fixture
def tls(signed: Callable[[str], Signed]) -> dict[str, Any]:
    """Settings, and what clients need: of the endpoint's authority, and of another one for clients."""
    servers, clients, strangers = signed("servers"), signed("clients"), signed("strangers")
    cert, key = servers.pair("front")
    return {
        "tls": {"cert": cert, "key": key}, "ca": servers.ca, "client_ca": clients.ca,
        "client": clients.pair("client"), "stranger": strangers.pair("stranger"),
    }  # fmt: skip


def credentials(ca: str, pair: tuple[str, str] | None = None) -> grpc.ChannelCredentials:
    cert, key = (Path(path).read_bytes() for path in pair) if pair else (None, None)
    return grpc.ssl_channel_credentials(Path(ca).read_bytes(), key, cert)


def test_tls_protects_both_endpoints(start_front: StartFront, tls: dict[str, Any]) -> None:
    with start_front(tls=tls["tls"], **QUICK) as front:
        trusting = ssl.create_default_context(cafile=tls["ca"])
        assert ask(front, tls=trusting) == b"hello"
        assert call(front.grpc(credentials(tls["ca"]))) == [b"hello", b"hello"]
        trusting.set_alpn_protocols(["h2", "http/1.1"])
        for port in (front.http_port, front.grpc_port):
            with socket.create_connection((HOST, port)) as raw, trusting.wrap_socket(raw, server_hostname=HOST) as sock:
                assert sock.selected_alpn_protocol() == "h2"
                assert sock.version() == "TLSv1.3"
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            ask(front)
        with pytest.raises(grpc.RpcError):
            call(front.grpc())
        with pytest.raises(ssl.SSLError):
            ask(front, tls=ssl.create_default_context(cafile=tls["client_ca"]))
        old = ssl.create_default_context(cafile=tls["ca"])
        with pytest.warns(DeprecationWarning, match="deprecated"):
            old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            ask(front, tls=old)
        seconds, _ = said_after(front.http_port, [b"\x16"], 0.2)  # a handshake that does not go on
        assert seconds < 4.0


def test_mutual_tls_turns_away_who_has_no_certificate(start_front: StartFront, tls: dict[str, Any]) -> None:
    with start_front(tls=tls["tls"] | {"client_ca": tls["client_ca"]}) as front:
        for pair, welcome in ((tls["client"], True), (None, False), (tls["stranger"], False)):
            context = ssl.create_default_context(cafile=tls["ca"])
            if pair:
                context.load_cert_chain(*pair)
            if welcome:
                assert ask(front, tls=context) == b"hello"
                assert call(front.grpc(credentials(tls["ca"], pair))) == [b"hello", b"hello"]
                continue
            with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
                ask(front, tls=context)
            with pytest.raises(grpc.RpcError):
                call(front.grpc(credentials(tls["ca"], pair)))


def test_what_is_written_is_for_this_user_alone(start_front: StartFront, tls: dict[str, Any]) -> None:
    with start_front("secret", tls=tls["tls"]) as front:
        text = (front.folder / "haproxy.cfg").read_text()
        for name in ("haproxy.cfg", ingress.SETTINGS, ingress.PEM, ingress.SCRIPT, "admin.sock"):
            assert not stat.S_IMODE((front.folder / name).stat().st_mode) & 0o077, name
        binds = re.findall(r"^ *bind (\S+):\d+", text, re.MULTILINE)
        assert binds == [HOST] * 4, "statistics and metrics are for this machine"


def test_another_template_is_refused() -> None:
    front = ingress.Front("", "", "", "", 1.0, 1.0, 1.0, 0, "")
    with pytest.raises(ingress.UnknownConfiguration, match=r"no section .*frontend grpc_frontend"):
        ingress.harden("global\ndefaults\n", front, "")
    odd = "global\n    stats socket /x level admin\n"
    with pytest.raises(ingress.UnknownConfiguration, match="stats socket"):
        ingress.harden(odd, front, "")
    with pytest.raises(ingress.UnknownConfiguration, match="quic4"):
        ingress.harden("frontend http_frontend\n    bind quic4@1.2.3.4:8000 ssl\n", front, "")


def test_hardening_twice_changes_nothing(start_front: StartFront) -> None:
    with start_front() as front:
        text = (front.folder / "haproxy.cfg").read_text()
        assert text.count("timeout client ") == 1
        assert ingress.harden(text, ingress.Front("", "", "", "", 9.0, 9.0, 9.0, 0, ""), "") == text


# ---- what `baton up` refuses


def checked(**tree: Any) -> None:
    ingress.check(parse(tree))


def test_strangers_are_not_served_by_accident(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "10.1.2.3", "some.host"):
        with pytest.raises(ConfigError, match="no API key") as refused:
            checked(ingress={"host": host})
        assert refused.value.field == "ingress.host"
        checked(ingress={"host": host}, security={"allow_anonymous": True})
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        checked(ingress={"host": host})
    (tmp_path / "keys").write_text("")
    checked(ingress={"host": "0.0.0.0"}, security={"api_keys_file": str(tmp_path / "keys")})
    with pytest.raises(ConfigError, match="cannot read"):
        checked(security={"api_keys_file": str(tmp_path / "none")})


def test_certificates_are_looked_at_before_anything_starts(tls: dict[str, Any]) -> None:
    checked(ingress={"tls": tls["tls"] | {"client_ca": tls["client_ca"]}})
    for change, field in (
        ({"cert": "/none"}, "ingress.tls.cert"),
        ({"key": tls["client"][1]}, "ingress.tls.cert"),
        ({"client_ca": tls["tls"]["key"]}, "ingress.tls.client_ca"),
    ):
        with pytest.raises(ConfigError) as refused:
            checked(ingress={"tls": tls["tls"] | change})
        assert refused.value.field == field
    for half in ({"cert": "c"}, {"key": "k"}, {"client_ca": "a"}):
        with pytest.raises(ConfigError, match=r"ingress\.tls"):
            parse({"ingress": {"tls": half}})
