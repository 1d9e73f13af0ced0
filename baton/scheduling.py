"""Threads that compute for long give way to those that wake up for a moment. Linux only; elsewhere nothing happens.

On cores that both share, a thread that wakes up to pass a token or a refusal on waits for the slice of whoever computes
to end: 3 ms, at each of the half dozen processes and threads on the way to the client. Niceness alone shortens nothing.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import threading

SLICE_NS = 20_000_000  # whoever wakes up with a shorter one (Linux's own is 3 ms) runs at once, from Linux 6.12 on
SET_ATTRIBUTES = {"x86_64": 314, "aarch64": 274}  # Linux's sched_setattr, which Python does not have
ATTRIBUTES = struct.Struct("=IIQiIQQQ")  # size, policy, flags, nice, priority, runtime, deadline, period


def give_way(niceness: int = 0) -> None:
    """This thread, and those that it starts, let others interrupt them at any time.

    niceness: that much is added to the thread's; Linux alone counts it by thread.
    """
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    nice = min(19, os.getpriority(os.PRIO_PROCESS, thread) + niceness)
    os.setpriority(os.PRIO_PROCESS, thread, nice)
    number = SET_ATTRIBUTES.get(platform.machine())
    if number is not None:
        wish = ATTRIBUTES.pack(ATTRIBUTES.size, os.SCHED_OTHER, 0, nice, 0, SLICE_NS, 0, 0)
        ctypes.CDLL(None).syscall(number, 0, wish, 0)  # a container may refuse it: then niceness has to do
