"""Two network namespaces joined by a link of a chosen rate: a veth pair with a token bucket at the sender's end.

Needs to run under ``unshare --net --map-root-user``, where this process is root over a network of its own.
"""

from __future__ import annotations

import socket
import subprocess
import threading
import time

NEAR, FAR = "10.7.0.1", "10.7.0.2"
MTU_BYTES = 65535  # as of a loopback device: with 1500, this machine's CPU bounds a stream at 8 Gb/s
LATENCY_MS = 50  # longest queue of the bucket


class Link:
    """From the process ``far_pid``, which owns an empty namespace and gets the address FAR, to this one at NEAR."""

    def __init__(self, far_pid: int) -> None:
        self._far = f"/proc/{far_pid}/ns/net"
        _ip("link", "set", "lo", "up")
        _ip("link", "add", "near", "mtu", str(MTU_BYTES), "type", "veth", "peer", "name", "far", "mtu", str(MTU_BYTES))
        _ip("link", "set", "far", "netns", str(far_pid))
        _ip("addr", "add", f"{NEAR}/24", "dev", "near")
        _ip("link", "set", "near", "up")
        for command in (
            ("addr", "add", f"{FAR}/24", "dev", "far"),
            ("link", "set", "far", "up"),
            ("link", "set", "lo", "up"),
        ):
            _run("nsenter", f"--net={self._far}", "ip", *command)

    def shape(self, gbit_per_s: float | None) -> None:
        """Limits what FAR sends; None lifts the limit. The bucket holds 2 ms, and one largest packet at least."""
        if gbit_per_s is None:
            _run(
                "nsenter",
                f"--net={self._far}",
                "tc",
                "qdisc",
                "replace",
                "dev",
                "far",
                "root",
                "pfifo",
                "limit",
                "1000",
            )
            return
        burst = max(2 * MTU_BYTES, int(gbit_per_s * 1e9 / 8 * 2e-3))
        _run(
            "nsenter", f"--net={self._far}", "tc", "qdisc", "replace", "dev", "far", "root", "tbf",
            "rate", f"{gbit_per_s}gbit", "burst", str(burst), "latency", f"{LATENCY_MS}ms",
        )  # fmt: skip


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


class RawSink:
    """Receives with ``recv_into`` at ``host`` what one connection sends: the link's rate as a plain socket sees it."""

    def __init__(self, host: str = NEAR) -> None:
        self._listener = socket.create_server((host, 0))
        self.port = int(self._listener.getsockname()[1])
        self.gb_per_s = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def result(self) -> float:
        """GB/s from the first byte to the last."""
        self._thread.join(60.0)
        self._listener.close()
        return self.gb_per_s

    def _run(self) -> None:
        stream, _ = self._listener.accept()
        room, begun_s = memoryview(bytearray(1 << 20)), time.monotonic()
        with stream:
            got = stream.recv_into(room)
            begun_s, total = time.monotonic(), 0
            while got:  # until the sender closes
                got = stream.recv_into(room)
                total += got
        self.gb_per_s = total / (time.monotonic() - begun_s) / 1e9
