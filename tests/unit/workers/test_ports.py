"""Ports of a local cluster."""

from __future__ import annotations

import socket

from deploy.supervisor import PORT_RANGE, free_ports


def test_free_ports_are_consecutive_and_free() -> None:
    first = free_ports(128)
    assert PORT_RANGE[0] <= first < PORT_RANGE[1]
    for port in range(first, first + 128):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
