"""How clients connect: addresses, keys, TLS, keepalive, servers that are not there yet."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from baton.client import Client, Retry, Tls
from baton.errors import ConfigError, InvalidRequest, Unavailable


def test_nobody_there_is_unavailable_soon() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    start_s = time.monotonic()
    with Client(f"127.0.0.1:{port}", retry=Retry(attempts=2)) as client, pytest.raises(Unavailable):
        client.status()
    assert time.monotonic() - start_s < 5.0


def test_a_server_that_comes_up_meanwhile_is_found(server: Any, relay_to: Any) -> None:
    """The client's port is a relay that begins to listen only after the first attempt."""
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = placeholder.getsockname()[1]
    relay = relay_to(server.address, port)
    threading.Timer(0.3, relay.start).start()
    with closing(relay), Client(f"127.0.0.1:{port}", retry=Retry(attempts=8)) as client:
        assert client.models()


def test_keepalive_notices_a_link_that_went_silent(server: Any, responses: Any, relay_to: Any) -> None:
    server.service.scripts = [[responses(1, "Hi"), 3.0]]
    relay = relay_to(server.address)
    address = f"127.0.0.1:{relay.start()}"
    with closing(relay), Client(address, keepalive_s=0.3, keepalive_timeout_s=0.3) as client:
        parts = client.stream("x", timeout_s=30.0)
        next(parts)
        relay.silence.set()
        start_s = time.monotonic()
        with pytest.raises(Unavailable):
            next(parts)
        assert time.monotonic() - start_s < 2.5


def test_the_key_and_the_wish_for_gzip_are_metadata(server: Any) -> None:
    with Client(server.address, api_key="secret-1", compress=True) as client:
        client.generate("x" * 5000)
    assert server.service.metadata[0]["authorization"] == "Bearer secret-1"
    assert server.service.metadata[0]["baton-response-encoding"] == "gzip"
    assert server.service.requests[0].prompt == "x" * 5000
    with pytest.raises(InvalidRequest, match="api_key") as refused:
        Client(server.address, api_key="sec\nret")
    assert "sec" not in refused.value.message.replace("characters", "")


def test_mutual_tls(mtls_server: Any, pki: Any) -> None:
    tls = Tls(ca=pki.ca_cert, cert=pki.client_cert, key=pki.client_key)
    with Client(mtls_server.address, tls=tls) as client:
        assert client.generate("x").text == "Hello"
    named = Tls(ca=pki.ca_cert, cert=pki.client_cert, key=pki.client_key, server_name="baton.test")
    with Client(mtls_server.address, tls=named) as client:
        assert client.health()


@pytest.mark.parametrize("wrong", ["nobody vouches for us", "we trust another", "another name"])
def test_tls_that_does_not_match_is_unavailable(mtls_server: Any, pki: Any, wrong: str) -> None:
    tls = {
        "nobody vouches for us": Tls(ca=pki.ca_cert),
        "we trust another": Tls(ca=pki.client_cert, cert=pki.client_cert, key=pki.client_key),
        "another name": Tls(pki.ca_cert, pki.client_cert, pki.client_key, server_name="elsewhere.test"),
    }[wrong]
    with Client(mtls_server.address, tls=tls, retry=Retry(attempts=1)) as client, pytest.raises(Unavailable):
        client.health()


def test_tls_files_are_checked(tmp_path: Path, pki: Any) -> None:
    with pytest.raises(ConfigError, match=r"tls\.ca"):
        Client("127.0.0.1:1", tls=Tls(ca=tmp_path / "nothing.pem"))
    with pytest.raises(ConfigError, match=r"tls\.key"):
        Client("127.0.0.1:1", tls=Tls(cert=pki.client_cert))
    with pytest.raises(ConfigError, match=r"tls\.cert"):
        Client("127.0.0.1:1", tls=Tls(key=pki.client_key))


@pytest.mark.parametrize("address", ["nowhere", ":1", "host:", "host:port"])
def test_an_address_has_host_and_port(address: str) -> None:
    with pytest.raises(InvalidRequest, match="address"):
        Client(address)
