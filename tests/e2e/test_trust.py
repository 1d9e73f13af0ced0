"""A cluster as `baton up` starts it: it has a key of its own, works with it, and strangers get nothing."""

from __future__ import annotations

import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from baton.errors import Unavailable
from baton.frames import FrameStream
from baton.messages import PLANE, Cancel
from baton.secure import ClusterKey
from baton.wire import inference_pb2 as pb

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., Any]) -> Iterator[Any]:
    with start_cluster(
        "trust", prefill={"kv_tokens": 4096}, decode={"kv_tokens": 4096}, handoff={"transport": "tcp"}
    ) as client:
        client.generate(prompt="Hello", sampling=pb.Sampling(temperature=0.0, max_tokens=4))
        yield client


def key_file(cluster: Any) -> Path:
    """In the cluster's state folder."""
    return Path(cluster.home) / "clusters" / "trust" / "cluster.key"


def worker_ports(client: Any) -> list[int]:
    """Every port that a worker process listens on: token plane, handoff control, staged KV."""
    planes = {int(w.address.rpartition(":")[2]) for pool in client.status().pools for w in pool.workers}
    listening = [c for c in psutil.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN and c.pid]
    workers = {c.pid for c in listening if c.laddr.port in planes}
    return [c.laddr.port for c in listening if c.pid in workers]


def test_the_key_is_this_users_and_in_no_log_or_command_line(cluster: Any) -> None:
    path = key_file(cluster)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = path.read_text().strip()
    assert len(key) >= 48
    for file in path.parent.iterdir():
        if file != path and file.is_file():
            assert key not in file.read_text(errors="replace"), file
    for process in psutil.process_iter(["cmdline"]):
        assert key not in " ".join(process.info["cmdline"] or [])


async def test_a_stranger_gets_no_hello_and_a_member_does(cluster: Any) -> None:
    (worker, *_) = cluster.status().pools[0].workers
    host, _, port = worker.address.rpartition(":")
    stranger = await FrameStream.connect(host, int(port), PLANE, timeout_s=5.0)
    stranger.send(Cancel("r"))
    assert await stranger.receive() is None
    stranger.abort()
    with pytest.raises(Unavailable, match="another cluster key"):
        await FrameStream.connect(host, int(port), PLANE, timeout_s=5.0, key=ClusterKey("x" * 40))
    key = ClusterKey(key_file(cluster).read_text())
    member = await FrameStream.connect(host, int(port), PLANE, timeout_s=5.0, key=key)
    assert type(await member.receive()).__name__ == "Hello"
    member.abort()


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 4096], ids=["nothing", "http", "zeros"])
def test_no_port_of_a_worker_tells_a_stranger_anything(cluster: Any, said: bytes) -> None:
    """At most it challenges: fewer bytes than any KV or record, and different ones each time."""
    for port in worker_ports(cluster):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            sock.sendall(said)
            sock.shutdown(socket.SHUT_WR)
            heard = b""
            try:
                while part := sock.recv(4096):
                    heard += part
            except (ConnectionResetError, TimeoutError):
                pass
            assert len(heard) <= 16 or not _ours(port, cluster), (port, heard)
    assert cluster.generate(prompt="Hello", sampling=pb.Sampling(temperature=0.0, max_tokens=4)).tokens


def _ours(port: int, client: Any) -> bool:
    """Whether Baton listens there; Ray's own ports of the same process answer in gRPC."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
        sock.settimeout(2.0)
        try:
            return b"\x04\x00\x00\x00\x00\x00" not in sock.recv(4096)
        except (ConnectionResetError, TimeoutError):
            return True
