"""NIXL over UCX: RDMA, CMA or TCP, whatever UCX finds, or what ``handoff.ucx_tls`` says.

Measured with NIXL 1.5.1 (docs/adr/0003-landing-buffers.md): the exporting agent needs a progress thread, which the
Python wrapper lets spin a whole core, so the agent is built through the bindings with a 100 µs delay; the fetching one
needs none and is polled with short sleeps. CMA copies inside ``postXferReq`` with the GIL released. A released transfer
is no fence: an unfinished one is kept and polled until it ends, and only then is its landing range free.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgpack

from baton.errors import ConfigError
from kvtransfer.arena import HostMemory
from kvtransfer.transports import FetchLost, check_range
from kvtransfer.transports.ucx_report import UcxPath, describe, parse_complaints, parse_paths

log = logging.getLogger(__name__)

_PROGRESS_DELAY_US = 100
_REPORT_BYTES = 4 << 20
_POLL_FIRST_S, _POLL_MOST_S = 50e-6, 1e-3
_QUICK_S = 0.05  # over UCX's TCP nothing is read between polls: for so long they stay close together
_process_tls: str | None = None


class _Report:
    """What UCX of this process writes: kept in memory, since it says there which transports it uses.

    An operator who sends UCX's log somewhere else keeps it there, and does without that answer.
    """

    def __init__(self) -> None:
        self._file: int | None = None
        self._complained = 0
        self._lock = threading.Lock()
        self._environment = threading.Lock()

    @contextlib.contextmanager
    def redirected(self) -> Iterator[None]:
        """For the time in which an agent is made: UCX reads these variables when it is loaded and when it makes one.

        Afterwards the environment is as before: a child process has no such descriptor, and its UCX would end it.
        """
        with self._environment:
            ours = self._variables()
            os.environ.update(ours)
            try:
                yield
            finally:
                for name in ours:
                    del os.environ[name]

    def _variables(self) -> dict[str, str]:
        if "UCX_LOG_FILE" in os.environ:
            return {}
        if self._file is None:
            self._file = os.memfd_create("ucx-log")
        ours = {"UCX_LOG_FILE": f"/proc/self/fd/{self._file}", "UCX_PROTO_INFO": "y"}
        return {name: value for name, value in ours.items() if name not in os.environ}

    def read(self) -> str:
        """Everything that UCX wrote so far; its new complaints go to this process's own log."""
        if self._file is None:
            return ""
        with self._lock:
            ctypes.CDLL(None).fflush(None)  # UCX writes through C's buffers
            text = os.pread(self._file, _REPORT_BYTES, 0).decode(errors="replace")
            complaints = parse_complaints(text)
            for complaint in complaints[self._complained :]:
                log.warning("ucx: %s", complaint)
            self._complained = len(complaints)
        return text


report = _Report()


def ucx_paths() -> tuple[UcxPath, ...]:
    """How UCX of this process moves bytes, as far as it has decided by now: every agent, peer and operation."""
    return parse_paths(report.read())


def _bindings(ucx_tls: str) -> Any:
    """NIXL's bindings; UCX reads UCX_TLS once per process, so the first agent fixes it."""
    global _process_tls  # noqa: PLW0603  UCX's own state is per process
    if _process_tls is None:
        if ucx_tls:
            os.environ["UCX_TLS"] = ucx_tls
        _process_tls = ucx_tls
    elif _process_tls != ucx_tls:
        raise ConfigError(f"this process already uses {_process_tls!r}, got {ucx_tls!r}", field="handoff.ucx_tls")
    try:
        with report.redirected():
            return importlib.import_module("nixl")._bindings
    except ImportError as error:
        raise ConfigError(f"transport nixl: {error}; install nixl or choose tcp", field="handoff.transport") from None


class _Agent:
    """One NIXL agent with one registered range of host memory. Calls are serialized: the agent has no locks."""

    def __init__(self, memory: HostMemory, *, name: str, ucx_tls: str, progress_thread: bool) -> None:
        self.b = _bindings(ucx_tls)
        config = self.b.nixlAgentConfig()
        config.useProgThread = progress_thread
        config.pthrDelay = _PROGRESS_DELAY_US
        config.useListenThread = False
        self.name, self.memory = name, memory
        self.lock = threading.Lock()
        try:
            with report.redirected():
                self.nixl = self.b.nixlAgent(name, config)
                self.nixl.createBackend("UCX", {})
            self._registered = self.b.nixlRegDList(self.b.DRAM_SEG)
            self._registered.addDesc((memory.address, memory.nbytes, 0, ""))
            self.nixl.registerMem(self._registered, [])
        except (RuntimeError, self.b.nixlBackendError) as error:
            raise ConfigError(f"transport nixl: no UCX agent: {error}", field="handoff.transport") from None
        log.info("nixl agent %s: %d MiB registered, UCX_TLS=%s", name, memory.nbytes >> 20, os.environ.get("UCX_TLS"))

    def descriptors(self, address: int, nbytes: int) -> Any:
        descriptors = self.b.nixlXferDList(self.b.DRAM_SEG)
        descriptors.addDesc((address, nbytes, 0))
        return descriptors

    def close(self) -> None:
        report.read()
        with self.lock:
            self.nixl.deregisterMem(self._registered, [])
            del self.nixl


class NixlExporter:
    def __init__(self, memory: HostMemory, *, name: str, ucx_tls: str) -> None:
        self._agent = _Agent(memory, name=f"{name}-export", ucx_tls=ucx_tls, progress_thread=True)
        self._address: bytes = msgpack.packb(
            [self._agent.name, self._agent.nixl.getLocalMD(), memory.address, memory.nbytes]
        )

    def address(self) -> bytes:
        return self._address

    def sending(self) -> None:
        return None  # by CMA it is the fetcher's processor that copies; what UCX's own threads do is not seen

    def close(self) -> None:
        self._agent.close()


class NixlFetcher:
    def __init__(self, memory: HostMemory, *, name: str, ucx_tls: str) -> None:
        self._agent = _Agent(memory, name=f"{name}-fetch", ucx_tls=ucx_tls, progress_thread=False)
        self._errors = _errors(self._agent.b)
        # Open sources by remote agent: a peer may reconnect before its old link is gone.
        self._users: dict[str, int] = {}

    def connect(self, address: bytes, deadline_s: float) -> NixlSource:
        try:
            name, metadata, base, exported = msgpack.unpackb(address, max_array_len=4, max_ext_len=0)
            valid = isinstance(name, str) and isinstance(metadata, bytes) and type(base) is type(exported) is int
        except (ValueError, TypeError, msgpack.UnpackException):
            valid = False
        if not valid:
            raise FetchLost("not a nixl address")
        agent = self._agent
        with agent.lock:
            if not self._users.get(name):
                try:
                    loaded = agent.nixl.loadRemoteMD(metadata)
                except self._errors as error:
                    raise FetchLost(f"nixl metadata of {name} refused: {error}") from None
                if loaded != name.encode():
                    agent.nixl.invalidateRemoteMD(loaded.decode())
                    raise FetchLost(f"nixl metadata is of {loaded!r}, not of {name}")
            self._users[name] = self._users.get(name, 0) + 1
        return NixlSource(self, agent, name, base, exported)

    def leave(self, name: str) -> None:
        with self._agent.lock:
            self._users[name] -= 1
            if self._users[name] == 0:
                del self._users[name]
                try:
                    self._agent.nixl.invalidateRemoteMD(name)
                except self._errors as error:
                    log.info("nixl agent %s was gone already: %s", name, error)

    def close(self) -> None:
        self._agent.close()


class NixlSource:
    def __init__(self, fetcher: NixlFetcher, agent: _Agent, name: str, base: int, exported: int) -> None:
        self._fetcher, self._agent, self._name = fetcher, agent, name
        self._base, self._exported = base, exported
        self._interrupted = False
        self._left = False
        self._carrier = ""

    def fetch(self, offset: int, nbytes: int, at: int, deadline_s: float) -> float:
        check_range(offset, nbytes, self._exported)
        if self._interrupted:
            raise FetchLost("interrupted")
        begun = time.monotonic()
        deadline = begun + deadline_s
        transfer = _Transfer(self._agent, self._name, self._base + offset, nbytes, at)
        pause_s = _POLL_FIRST_S
        while not transfer.poll():
            now = time.monotonic()
            if self._interrupted or now >= deadline:
                reason = "interrupted" if self._interrupted else f"stalled for {deadline_s:.1f} s"
                raise FetchLost(f"nixl fetch of {nbytes} bytes {reason}", transfer.ended)
            time.sleep(pause_s)
            if now - begun > _QUICK_S:
                pause_s = min(_POLL_MOST_S, pause_s * 1.5)
        return 0.0

    def carrier(self) -> str:
        self._carrier = self._carrier or describe(ucx_paths(), self._agent.name)  # once known: it is asked per handoff
        return self._carrier or "UCX's choice, unknown"

    def interrupt(self) -> None:
        self._interrupted = True

    def close(self) -> None:
        self._interrupted = True
        if not self._left:
            self._left = True
            self._fetcher.leave(self._name)


class _Transfer:
    """One READ, from its posting until NIXL itself says that it is over."""

    def __init__(self, agent: _Agent, name: str, remote: int, nbytes: int, at: int) -> None:
        self._agent, self._handle, self._posted = agent, None, False
        self._errors = _errors(agent.b)
        local = agent.descriptors(agent.memory.address + at, nbytes)
        with agent.lock:
            try:
                self._handle = agent.nixl.createXferReq(
                    agent.b.NIXL_READ, local, agent.descriptors(remote, nbytes), name, "", []
                )
            except self._errors as error:
                raise FetchLost(f"nixl fetch of {nbytes} bytes: {error}") from None

    def poll(self) -> bool:
        """True when the bytes are there; raises :class:`FetchLost` when they will never be."""
        agent = self._agent
        with agent.lock:
            if self._handle is None:
                return True
            try:
                step = agent.nixl.getXferStatus if self._posted else agent.nixl.postXferReq
                self._posted = True
                status = step(self._handle)
            except self._errors as error:
                self._release()
                raise FetchLost(f"nixl: {error}") from None
            if status == agent.b.NIXL_IN_PROG:
                return False
            self._release()
            if status != agent.b.NIXL_SUCCESS:
                raise FetchLost(f"nixl: {status}")
            return True

    def ended(self) -> bool:
        """Whether this transfer can write no more, whatever became of it."""
        try:
            return self.poll()
        except FetchLost:
            return True

    def _release(self) -> None:
        handle, self._handle = self._handle, None
        try:
            self._agent.nixl.releaseXferReq(handle)
        except self._errors as error:
            log.warning("nixl keeps a finished transfer: %s", error)


def _errors(b: Any) -> tuple[type[Exception], ...]:
    """Everything that the bindings raise; they have no common base."""
    return tuple(
        error for name in dir(b) if name.endswith("Error")
        if isinstance(error := getattr(b, name), type) and issubclass(error, Exception)
    )  # fmt: skip
