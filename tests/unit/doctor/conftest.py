"""A machine, a worker and a pair of workers in which everything is in order, to be changed by one fact at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from baton.host import HostFacts
from baton.messages import Hello, ProbeLanded, ProbeSent
from deploy.doctor.facts import Direction, Pair, Worker

HOST = HostFacts(
    hostname="node1", boot_id="b1", pid_namespace="pid:[1]", user_id=1000, ptrace_scope=0, clock_s=1000.0,
    python="3.11.9", packages={"baton": "0.1.0", "torch": "2.13.0"}, memlock_bytes=8 << 20, open_files=65536,
    shm_bytes=8 << 30, shm_free_bytes=7 << 30, rdma_devices=(), nvidia_gpus=0, ucx={},
)  # fmt: skip
SENT = ProbeSent("p", 0.05, 0.01, 0.02, 32 << 20, 5e9, 1e-4)
LANDED = ProbeLanded("p", True, 33 << 20, 9000, "nixl", "cma/memory (intra-node, zero-copy)")


class Sound:
    """Builds facts; every keyword replaces one of them."""

    def host(self, **changed: Any) -> HostFacts:
        return replace(HOST, **changed)

    def worker(self, role: str = "decode", **changed: Any) -> Worker:
        hello = Hello(role, "w", "g", "layout1", "float32")
        return replace(Worker(f"{role} w", role, "10.0.0.1:700", "", hello, HOST, 0.001, 0.0), **changed)

    def direction(self, codec: str = "raw", **landed: Any) -> Direction:
        return Direction(codec, SENT, replace(LANDED, **landed))

    def pair(self, *forward: Direction, **hosts: Any) -> Pair:
        """``prefill`` and ``decode``: changed hosts."""
        prefill = self.worker("prefill", host=hosts.get("prefill", HOST))
        decode = self.worker("decode", host=hosts.get("decode", HOST))
        return Pair(prefill, decode, forward or (self.direction(),), self.direction())


@pytest.fixture
def sound() -> Sound:
    return Sound()
