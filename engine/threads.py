"""OpenMP threads belong to the thread that steps the engine, and to no other of its process.

libgomp counts the helpers of every thread that computed in parallel, for as long as that thread lives. With more of
them than cores it sleeps between two kernels instead of spinning: on two cores a decode step took 28 ms then, not 14.
"""

from __future__ import annotations

import threading

import torch


def compute_here(threads: int) -> None:
    """torch computes with ``threads`` on this thread, and alone on every thread that first uses it from now on."""
    torch.set_num_threads(threads)
    # A thread that first uses torch takes the number that was last set anywhere, and keeps it: this one does so now.
    torch.get_num_threads()
    last = threading.Thread(target=torch.set_num_threads, args=(1,))
    last.start()
    last.join()
