"""What a thread asks of Linux's scheduler, read back from it."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from baton.scheduling import ATTRIBUTES, SET_ATTRIBUTES, SLICE_NS, give_way

RELEASE = tuple(int(number) for number in platform.release().split(".")[:2]) if sys.platform == "linux" else (0, 0)


def asked() -> tuple[int, int]:
    """Niceness and slice (ns) of this thread."""
    state = ctypes.create_string_buffer(ATTRIBUTES.size)
    number = SET_ATTRIBUTES[platform.machine()] + 1  # sched_getattr
    if ctypes.CDLL(None, use_errno=True).syscall(number, 0, state, ATTRIBUTES.size, 0) != 0:
        pytest.skip(f"sched_getattr is refused here: {os.strerror(ctypes.get_errno())}")
    _, _, _, nice, _, runtime, _, _ = ATTRIBUTES.unpack(state.raw)
    return nice, runtime


@pytest.mark.skipif(RELEASE < (6, 12) or platform.machine() not in SET_ATTRIBUTES, reason="slices need Linux 6.12")
def test_a_thread_that_gives_way_has_long_slices_and_its_process_has_not() -> None:
    def work() -> tuple[int, int]:
        give_way(2)
        return asked()

    before = asked()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == (before[0] + 2, SLICE_NS)
    assert asked() == before
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before[0]
