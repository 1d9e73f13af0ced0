"""Nodes of a Ray that runs already: which of them cannot run the application, and what mends it."""

from __future__ import annotations

import socket

import pytest

from baton.config import Config
from baton.errors import Unavailable
from deploy import existing
from deploy.serve_config import environment

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


def test_no_ray_at_the_address_is_said_at_once() -> None:
    with socket.socket() as bound:  # bound, not listening: nobody answers, and nobody else takes the port
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(Unavailable, match=f"no Ray answers at {address}"):
            existing.up(Config(), address, progress=print)
