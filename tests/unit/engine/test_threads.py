"""Only the thread that asked for them computes with several threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.threads import NICENESS, compute_here, give_way


def _in_a_thread(call: Callable[[], int]) -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_the_caller_has_them_and_later_threads_do_not() -> None:
    before = torch.get_num_threads()
    try:
        compute_here(2)
        assert torch.get_num_threads() == 2
        assert _in_a_thread(torch.get_num_threads) == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="niceness is a thread's own only on Linux")
def test_a_thread_that_gives_way_is_nicer_than_its_process_and_so_are_its_own_threads() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def work() -> int:
        give_way()
        return _in_a_thread(niceness)

    before = niceness()
    assert _in_a_thread(work) == before + NICENESS
    assert niceness() == before


PROGRAM = """
import os, threading
import torch
from engine.threads import compute_here

computed, counted = threading.Barrier(5, timeout=60), threading.Barrier(5, timeout=60)

def work(threads=0):
    if threads:
        compute_here(threads)
        assert torch.get_num_threads() == threads
        started.set()
        begin.wait(60)
    (torch.ones(1 << 22) * 2.0).sum()
    computed.wait()
    counted.wait()

started, begin = threading.Event(), threading.Event()
threading.Thread(target=work, args=(2,)).start()
started.wait(60)
before = set(os.listdir("/proc/self/task"))  # with those of torch's other pools, and one that may still be ending
for _ in range(3):
    threading.Thread(target=work).start()
begin.set()
computed.wait()
print(len(set(os.listdir("/proc/self/task")) - before))
counted.wait()
"""


def test_no_other_thread_of_the_process_gets_helpers() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) == 3 + 1  # the other threads, and one helper of the engine's
