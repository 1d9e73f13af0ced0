"""OpenMP threads belong to the thread that steps the engine, and to no other of its process; it gives way to others.

libgomp counts the helpers of every thread that computed in parallel, for as long as that thread lives. With more of
them than cores it sleeps between two kernels instead of spinning: on two cores a decode step took 28 ms then, not 14.
"""

from __future__ import annotations

import os
import sys
import threading

import torch

NICENESS = 5  # a third of the weight of a thread that gives no way


def compute_here(threads: int) -> None:
    """torch computes with ``threads`` on this thread, and alone on every thread that first uses it from now on."""
    torch.set_num_threads(threads)
    # A thread that first uses torch takes the number that was last set anywhere, and keeps it: this one does so now.
    torch.get_num_threads()
    last = threading.Thread(target=torch.set_num_threads, args=(1,))
    last.start()
    last.join()


def give_way() -> None:
    """This thread, and the helpers that it starts, compute when nobody on these cores has anything short to do.

    Else whoever talks to clients stands in line behind whole steps: on two busy cores half of the refusals took 38 ms.
    Linux alone counts niceness by thread.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)
