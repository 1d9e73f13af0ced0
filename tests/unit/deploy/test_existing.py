"""Nodes of a Ray that runs already: which of them cannot run the application, and what mends it."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from baton.config import Config, parse
from baton.errors import ConfigError, Unavailable
from deploy import existing
from deploy.serve_config import environment, serve_config

ENVIRONMENT = environment(Config())
FOUND = {**ENVIRONMENT, existing.FRONT: "/run/baton/haproxy"}


def test_nodes_with_baton_and_its_environment_are_taken() -> None:
    nodes = [existing.Node(f"10.0.0.{i}", "0.1.0", {**FOUND, "PATH": "/bin"}) for i in range(3)]
    assert existing.faults(nodes, ENVIRONMENT, "0.1.0") == []


def test_a_node_without_baton_or_its_environment_is_named_with_what_mends_it() -> None:
    nodes = [
        existing.Node("10.0.0.1", "", FOUND),
        existing.Node("10.0.0.2", "0.0.9", FOUND),
        existing.Node("10.0.0.3", "0.1.0", {**FOUND, "RAY_SERVE_ENABLE_HA_PROXY": None}),
    ]
    nodes.append(existing.Node("10.0.0.4", "0.1.0", ENVIRONMENT))
    missing, old, bare, open_front = existing.faults(nodes, ENVIRONMENT, "0.1.0")
    assert missing == "Baton is not installed on 10.0.0.1, 0.1.0 is needed: install it there"
    assert "has version 0.0.9 on 10.0.0.2" in old
    assert "without RAY_SERVE_ENABLE_HA_PROXY" in bare
    assert "baton config env" in bare
    assert "on 10.0.0.4 was started without RAY_SERVE_HAPROXY_BINARY_PATH" in open_front


def test_files_are_looked_for_on_the_nodes_and_not_here() -> None:
    config = parse({"security": {"api_keys_file": "/nowhere/keys"}, "ingress": {"tls": {"cert": "/c", "key": "/k"}}})
    assert existing.files(config) == {
        "security.api_keys_file": "/nowhere/keys", "ingress.tls.cert": "/c", "ingress.tls.key": "/k"
    }  # fmt: skip
    assert existing.files(Config()) == {}
    node = existing.Node("10.0.0.1", "0.1.0", FOUND, ("security.api_keys_file",))
    (fault,) = existing.faults([node], ENVIRONMENT, "0.1.0")
    assert "10.0.0.1 cannot read the files that security.api_keys_file" in fault
    with pytest.raises(Unavailable, match="no Ray answers"):  # no ConfigError: the caller's machine need not have them
        existing.up(config, "127.0.0.1:1", progress=print)


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"http_options": {"port": 8001}}, "ingress.http_port", "is 8000, and the Serve that runs there keeps 8001"),
        ({"http_options": {"host": "0.0.0.0"}}, "ingress.host", "keeps 0.0.0.0"),
        ({"grpc_options": {"port": 9001}}, "ingress.grpc_port", "keeps 9001"),
        ({"grpc_options": {"grpc_servicer_functions": []}}, "ingress", "was started without"),
    ],
)
def test_a_serve_that_listens_elsewhere_is_said(change: dict[str, dict[str, Any]], field: str, words: str) -> None:
    wanted = serve_config(Config())
    running = {"http_options": dict(wanted["http_options"]), "grpc_options": dict(wanted["grpc_options"])}
    existing.require_same_ingress(running, wanted)
    for section, keys in change.items():
        running[section] |= keys
    with pytest.raises(ConfigError, match=words) as told:
        existing.require_same_ingress(running, wanted)
    assert told.value.field == field


def test_no_ray_at_the_address_is_said_at_once() -> None:
    with socket.socket() as bound:  # bound, not listening: nobody answers, and nobody else takes the port
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(Unavailable, match=f"no Ray answers at {address}"):
            existing.up(Config(), address, progress=print)
