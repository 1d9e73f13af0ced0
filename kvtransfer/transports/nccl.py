"""Groups of two GPUs, formed with libnccl itself.

torch's ProcessGroupNCCL ends the whole process when a member fails or hangs, unless variables of the environment say
otherwise, and then for the ranks of the worker's own model as well. Communicators here are non-blocking: every wait is
a loop with a deadline that also sees the connection end, and whoever gives up aborts its communicator
(docs/adr/0012). The calls and layouts are those of nccl.h since NCCL 2.14.

    16 bytes of each member's GPU, both ways       the exporter's ncclUniqueId
"""

from __future__ import annotations

import ctypes
import hashlib
import select
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from baton.errors import ConfigError
from kvtransfer.transports.collective import EXPORTER
from kvtransfer.transports.data_port import receive

_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8 = 1
_CONFIG_MAGIC, _CONFIG_VERSION = 0xCAFEBEEF, 21400  # of _Config's layout, which later libraries still take
_ID_BYTES, _GPU_BYTES = 128, 16
_NAP_S = 20e-6


class _Id(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * _ID_BYTES),)


class _Config(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t), ("magic", ctypes.c_uint), ("version", ctypes.c_uint), ("blocking", ctypes.c_int),
    )  # fmt: skip


def load() -> ctypes.CDLL:
    """The library that torch brought along. Raises :class:`ConfigError`."""
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError as error:
        raise ConfigError(f"cannot load NCCL: {error}; choose nixl or tcp", field="handoff.transport") from None
    version = ctypes.c_int()
    library.ncclGetVersion(ctypes.byref(version))
    if version.value < _CONFIG_VERSION:
        raise ConfigError(f"NCCL {version.value} has no non-blocking communicators", field="handoff.transport")
    library.ncclGetErrorString.restype = ctypes.c_char_p
    library.ncclCommInitRankConfig.argtypes = (
        ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, _Id, ctypes.c_int, ctypes.POINTER(_Config),
    )  # fmt: skip
    for transfer in (library.ncclSend, library.ncclRecv):
        transfer.argtypes = (
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        )  # fmt: skip
    library.ncclCommGetAsyncError.argtypes = (ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
    library.ncclCommAbort.argtypes = (ctypes.c_void_p,)
    return library


def new_id(library: ctypes.CDLL) -> bytes:
    made = _Id()
    _check(library, library.ncclGetUniqueId(ctypes.byref(made)))
    return bytes(made)


def _check(library: ctypes.CDLL, code: int) -> None:
    if code not in (_SUCCESS, _IN_PROGRESS):
        raise RuntimeError(library.ncclGetErrorString(code).decode())


def meet(sock: socket.socket, gpu: bytes, deadline: float) -> None:
    """Raises OSError if the other member computes on the same GPU, which NCCL does not serve."""
    sock.sendall(gpu)
    if receive(sock, _GPU_BYTES, deadline) == gpu:
        raise ConnectionRefusedError("both workers are on one GPU, NCCL needs one for each: see handoff.transport")


def until(done: Callable[[], bool], sock: socket.socket, deadline: float) -> None:
    """Returns when ``done()``. Raises OSError at the deadline, and when either member ended their connection."""
    ended = select.poll()
    ended.register(sock, select.POLLRDHUP)
    while not done():
        if time.monotonic() >= deadline:
            raise TimeoutError("timed out")
        if ended.poll(0):
            raise ConnectionResetError("the connection of the two ended")
        time.sleep(_NAP_S)


def _identity(device: torch.device) -> bytes:
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return hashlib.blake2b(uuid.encode(), digest_size=_GPU_BYTES).digest()


class Nccl:
    """Between one of this process's GPUs, the first or the last that it sees, and those of others."""

    name = "nccl"

    def __init__(self, *, last_gpu: bool) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("nccl joins GPUs, this worker sees none; choose gloo or tcp", field="handoff.transport")
        self._library = load()
        self._device = torch.device("cuda", torch.cuda.device_count() - 1 if last_gpu else 0)

    def form(self, sock: socket.socket, rank: int, deadline_s: float) -> NcclGroup:
        deadline = time.monotonic() + deadline_s
        meet(sock, _identity(self._device), deadline)
        if rank == EXPORTER:
            name = new_id(self._library)
            sock.sendall(name)
        else:
            name = receive(sock, _ID_BYTES, deadline)
        group = NcclGroup(self._library, self._device, rank, sock)
        try:
            group.join(name, deadline)
        except (OSError, RuntimeError):
            group.close()
            raise
        return group


class NcclGroup:
    def __init__(self, library: ctypes.CDLL, device: torch.device, rank: int, sock: socket.socket) -> None:
        self.device = device
        self._library, self._rank = library, rank
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._comm = ctypes.c_void_p()
        self._sock = sock

    def join(self, name: bytes, deadline: float) -> None:
        config = _Config(ctypes.sizeof(_Config), _CONFIG_MAGIC, _CONFIG_VERSION, 0)
        with self.lane():
            code = self._library.ncclCommInitRankConfig(
                ctypes.byref(self._comm), 2, _Id.from_buffer_copy(name), self._rank, ctypes.byref(config)
            )
            _check(self._library, code)
            until(self._settled, self._sock, deadline)

    def lane(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def send(self, data: Tensor, deadline: float) -> None:
        self._transfer(self._library.ncclSend, data, deadline)

    def receive(self, room: Tensor, deadline: float) -> None:
        self._transfer(self._library.ncclRecv, room, deadline)

    def close(self) -> None:
        comm, self._comm = self._comm, ctypes.c_void_p()
        if comm:
            self._library.ncclCommAbort(comm)

    def _transfer(self, call: Callable[..., int], data: Tensor, deadline: float) -> None:
        stream = self._stream.cuda_stream
        _check(self._library, call(data.data_ptr(), data.numel(), _UINT8, 1 - self._rank, self._comm, stream))
        until(self._settled, self._sock, deadline)  # only then is it on the stream
        reached: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        reached.record(self._stream)
        until(lambda: self._settled() and reached.query(), self._sock, deadline)

    def _settled(self) -> bool:
        """Whether the communicator has taken up what was asked of it; raises RuntimeError for its errors."""
        state = ctypes.c_int(_SUCCESS)
        _check(self._library, self._library.ncclCommGetAsyncError(self._comm, ctypes.byref(state)))
        _check(self._library, state.value)
        return state.value == _SUCCESS
