"""Clusters of one machine share no port: whoever shares one gets half of the other's calls (Serve: SO_REUSEPORT)."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from baton.config import parse
from deploy import supervisor

ON_MACHINES_OF_ITS_OWN = {"RAY_SERVE_WORKER_PROXY_HTTP_PORT", "RAY_SERVE_WORKER_PROXY_GRPC_PORT"}  # off unless set


def test_every_port_of_serve_is_a_clusters_own(tmp_path: Path) -> None:
    spec = find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    constants = Path(spec.origin).parent / "serve" / "_private" / "constants.py"
    known = set(re.findall(r'"(RAY_SERVE_\w+_PORT)"', constants.read_text(encoding="utf-8"))) - ON_MACHINES_OF_ITS_OWN
    assert len(known) >= 8
    environment = supervisor.environment(parse({}), tmp_path)
    assert known <= environment.keys()
    ports = [int(environment[name]) for name in known]
    assert len(set(ports)) == len(ports)
    first, last = supervisor.PORT_RANGE
    assert all(first <= port < last + 2 * supervisor.INGRESS_PORTS + 4 for port in ports)
