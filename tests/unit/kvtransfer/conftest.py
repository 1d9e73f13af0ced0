"""Two workers in two real processes, forked from one that has torch loaded, so that a kill costs no second import."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import multiprocessing
import os
import runpy
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from kvtransfer.protocol import Parcel

PEER = Path(__file__).with_name("peer.py")
LAYOUT = {"model": "m", "layers": 4, "kv_heads": 2, "head_dim": 32, "dtype": "float32"}
TRANSPORTS = ("tcp", "tcp-tls", "nixl", "nixl-over-tcp", "gloo")
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL is not tested here: it needs two GPUs")
NCCL = pytest.param("nccl", marks=TWO_GPUS)
Answer = Any


class Worker:
    """A peer process. ``call`` waits for the answer; ``start`` does not, ``answer`` then does."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["kvtransfer.sender", "kvtransfer.receiver"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=runpy.run_path, args=(str(PEER),), kwargs={"init_globals": {"connection": theirs}}, daemon=True
        )
        self._process.start()
        theirs.close()
        self._number = 0
        self._answers: dict[int, tuple[bool, Answer]] = {}

    def start(self, method: str, *args: Any, **kwargs: Any) -> int:
        self._number += 1
        self._pipe.send((self._number, method, args, kwargs))
        return self._number

    def answer(self, number: int, *, timeout_s: float = 20.0) -> Answer:
        deadline = time.monotonic() + timeout_s
        while number not in self._answers:
            assert self._pipe.poll(max(0.0, deadline - time.monotonic())), f"no answer within {timeout_s} s"
            answered, good, value = self._pipe.recv()
            self._answers[answered] = (good, value)
        good, value = self._answers.pop(number)
        if not good:
            raise RuntimeError(value)
        return value

    def call(self, method: str, *args: Any, **kwargs: Any) -> Answer:
        return self.answer(self.start(method, *args, **kwargs))

    def has_answered(self, number: int) -> bool:
        while self._pipe.poll(0):
            answered, good, value = self._pipe.recv()
            self._answers[answered] = (good, value)
        return number in self._answers

    def signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # a test may have killed it already
            self.signal(signal.SIGKILL)
        self._process.join(5)
        self._pipe.close()


def wire_config(transport: str, tls: dict[str, str]) -> dict[str, Any]:
    """The part of ``HandoffConfig`` that makes it the transport that tests call so."""
    return {
        "transport": transport.partition("-")[0],
        "ucx_tls": "tcp" if transport == "nixl-over-tcp" else "",
        "tls": tls if transport == "tcp-tls" else {},
    }


@dataclass
class Pair:
    """A prefill and a decode worker; with the loopback transport they are one process."""

    transport: str
    prefill: Worker
    decode: Worker
    layout: dict[str, Any] = field(default_factory=lambda: dict(LAYOUT))
    tls: dict[str, str] = field(default_factory=dict)  # of tcp-tls

    def config(self, **changes: Any) -> dict[str, Any]:
        base = {"stall_s": 1.0, "lease_s": 2.0, "landing_bytes": 8 << 20, "staging_bytes": 8 << 20}
        return wire_config(self.transport, self.tls) | base | changes

    def begin(self, **changes: Any) -> None:
        self.decode.call("start_receiver", self.layout, self.config(**changes))
        self.prefill.call("start_sender", self.layout, self.config(**changes))

    def hand_over(self, request_id: str, *, tokens: int = 150, codec: str = "raw", seed: int = 3) -> Answer:
        """One whole handoff; the receiver's outcome."""
        ticket = self.decode.call("reserve", request_id, tokens=tokens, codec=codec)
        self.prefill.call("send", ticket, seed, tokens=tokens)
        outcome = self.decode.call("received", request_id)
        self.decode.call("release", request_id)
        return outcome

    def idle(self, timeout_s: float = 3.0) -> None:
        """Both sides hold nothing, within ``timeout_s``."""
        self.until(lambda: self.decode_held() == (0, 0, 0) and self.prefill_held() == (0, 0), timeout_s)

    def decode_held(self) -> tuple[int, int, int]:
        stats = self.decode.call("receiver_stats")
        return stats.leases, stats.landing_bytes_used, stats.quarantined_bytes

    def prefill_held(self) -> tuple[int, int]:
        stats = self.prefill.call("sender_stats")
        return stats.handoffs, stats.staging_bytes_used

    @staticmethod
    def until(condition: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s"
            time.sleep(0.01)


@dataclass(frozen=True)
class Promises:
    """What a transport promises beyond the contract, each tested both ways: see docs/transports.md."""

    fenced: bool = (
        True  # a fetch that was given up writes no more; else its landing range waits until the transfer ends
    )
    reads_the_stopped: bool = False  # a stopped peer's memory can be read
    interruptible: bool = True  # interrupt() ends a fetch from a stopped peer, which otherwise waits for its deadline


PROMISES = {
    "tcp": Promises(),
    "tcp-tls": Promises(),
    "nixl": Promises(reads_the_stopped=True),  # CMA: the kernel copies
    "nixl-over-tcp": Promises(fenced=False),
    "gloo": Promises(interruptible=False),
    "nccl": Promises(),
}


class Authority:
    """Signs certificates; ``files`` are what ``handoff.tls`` takes."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._write("ca.pem", self._sign(self._name, self._key.public_key(), authority=True))

    def files(self, worker: str) -> dict[str, str]:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, worker)])
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return {
            "cert": self._write(f"{worker}.pem", self._sign(name, key.public_key(), authority=False)),
            "key": self._write(f"{worker}.key", private),
            "ca": str(self._folder / "ca.pem"),
        }

    def _sign(self, name: x509.Name, key: ec.EllipticCurvePublicKey, *, authority: bool) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder().subject_name(name).issuer_name(self._name).public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )  # fmt: skip
        return certificate.public_bytes(serialization.Encoding.PEM)

    def _write(self, name: str, data: bytes) -> str:
        path = self._folder / name
        path.write_bytes(data)
        return str(path)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "workers")


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Another authority, that nobody here trusts."""
    return Authority(tmp_path_factory.mktemp("stranger"), "strangers")


@pytest.fixture(scope="session")
def tls(authority: Authority) -> dict[str, str]:
    return authority.files("worker")


def _begun(transport: str, tls: dict[str, str], layout: dict[str, Any] | None = None, **changes: Any) -> Iterator[Pair]:
    decode = Worker()
    prefill = decode if transport == "loopback" else Worker()
    pair = Pair(transport, prefill, decode, layout=layout or dict(LAYOUT), tls=tls)
    try:
        pair.begin(**changes)
        yield pair
    finally:
        prefill.end()
        decode.end()


@pytest.fixture(scope="module", params=("loopback", *TRANSPORTS, NCCL))
def standing(request: pytest.FixtureRequest, tls: dict[str, str]) -> Iterator[Pair]:
    yield from _begun(request.param, tls, landing_bytes=160 << 20)


@pytest.fixture
def pair(standing: Pair) -> Iterator[Pair]:
    """Two workers that many tests share, so every test must leave them holding nothing."""
    yield standing
    standing.idle()


@pytest.fixture
def small_pair() -> Iterator[Pair]:
    """One process with room for two blocks on either side."""
    yield from _begun("loopback", {}, landing_bytes=2400 << 10, staging_bytes=2400 << 10)


@pytest.fixture(params=(*TRANSPORTS, NCCL))
def mortal_pair(request: pytest.FixtureRequest, tls: dict[str, str]) -> Iterator[Pair]:
    """Two processes of one test, to be stopped and killed; the receiver has room for one block."""
    yield from _begun(request.param, tls, landing_bytes=1200 << 10)


@pytest.fixture(params=["tcp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("loopback", *TRANSPORTS[1:])),
                        pytest.param("nccl", marks=(TWO_GPUS, pytest.mark.slow))])  # fmt: skip
def wide_pair(request: pytest.FixtureRequest, tls: dict[str, str]) -> Iterator[Pair]:
    """Room for thousands of leases; only what is used of it becomes resident."""
    yield from _begun(request.param, tls, landing_bytes=2600 << 20, staging_bytes=64 << 20, stall_s=20.0, lease_s=60.0)


@pytest.fixture(params=("loopback", *TRANSPORTS, NCCL))
def large_pair(request: pytest.FixtureRequest, tls: dict[str, str]) -> Iterator[Pair]:
    """A layout of which 8,192 tokens are one GiB, and 32 MiB of buffers on either side."""
    layout = {"model": "m", "layers": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    yield from _begun(request.param, tls, layout, landing_bytes=32 << 20, staging_bytes=32 << 20, stall_s=10.0)


class Ends:
    """An exporting and a fetching process of one transport, without the handoff around them."""

    def __init__(self, transport: str, tls: dict[str, str]) -> None:
        self.transport, self.promises = transport, PROMISES[transport]
        self.config = wire_config(transport, tls)
        self.fetcher, self.exporter = Worker(), Worker()

    def replace_exporter(self) -> None:
        self.exporter.end()
        self.exporter = Worker()

    def connect(self, nbytes: int, *, seed: int = 1) -> int:
        """Exports ``nbytes`` of the pattern of ``seed``; a source of them, landing in zeroed memory."""
        return self.fetcher.call("connect", self.config, self.exporter.call("export", self.config, nbytes, seed))

    def fetch(self, source: int, offset: int, nbytes: int, at: int, deadline_s: float = 5.0) -> Answer:
        """Why it was lost or "", whether the landing range is fenced, and seconds."""
        return self.fetcher.call("fetch", source, offset, nbytes, at, deadline_s)

    def holds(self, seed: int, offset: int, nbytes: int, at: int) -> bool:
        """Whether the landing memory has ``nbytes`` of the pattern of ``seed`` at ``at``; seed 0 is zeros."""
        return self.fetcher.call("holds", seed, offset, nbytes, at)

    def wait_for_the_end(self) -> None:
        """Until the last fetch can write no more."""
        Pair.until(lambda: self.fetcher.call("transfer_ended"), 5)

    def reset(self) -> None:
        """Nothing is exported or connected any more."""
        if self.exporter.alive:
            self.exporter.signal(signal.SIGCONT)
        self.wait_for_the_end()
        self.fetcher.call("close_sources")
        if self.exporter.alive:
            self.exporter.call("close_export")
        else:
            self.replace_exporter()


@pytest.fixture(scope="module", params=(*TRANSPORTS, NCCL))
def standing_ends(request: pytest.FixtureRequest, tls: dict[str, str]) -> Iterator[Ends]:
    made = Ends(request.param, tls)
    yield made
    made.fetcher.end()
    made.exporter.end()


@pytest.fixture
def ends(standing_ends: Ends) -> Iterator[Ends]:
    yield standing_ends
    standing_ends.reset()


@pytest.fixture
def alter():
    """A parcel of one block with changes to it and, where they are the block's, to that."""

    def alter(parcel, changes):
        own = changes.keys() & {field.name for field in dataclasses.fields(Parcel)}
        (block,) = parcel.blocks
        block = dataclasses.replace(block, **{name: changes[name] for name in changes.keys() - own})
        return dataclasses.replace(parcel, blocks=(block,), **{name: changes[name] for name in own})

    return alter
