from __future__ import annotations

import os
import threading
import time

import pytest

from kvtransfer import processor


def test_a_thread_that_shares_its_core_has_waited_for_it():
    if not os.path.exists("/proc/thread-self/schedstat"):
        pytest.skip("this kernel does not count")
    before = os.sched_getaffinity(0)
    done = threading.Event()
    child = os.fork()
    if child == 0:  # pinned to the same core, until it is killed
        os.sched_setaffinity(0, {min(before)})
        while True:
            pass
    waited: list[float] = []

    def work() -> None:
        os.sched_setaffinity(0, {min(before)})  # of this thread
        begun_s, waited_s = time.monotonic(), processor.waited_s()
        while time.monotonic() - begun_s < 0.5:
            pass
        waited.append(processor.waited_s() - waited_s)
        done.set()

    threading.Thread(target=work).start()
    try:
        assert done.wait(10.0)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert 0.1 < waited[0] < 0.5


def test_a_thread_that_sleeps_waits_for_nothing():
    before_s = processor.waited_s()
    time.sleep(0.05)
    assert processor.waited_s() - before_s < 0.04


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", None), ("50000 100000", 0.5), ("nonsense", None), (None, None)]
)
def test_cores_are_those_of_affinity_within_the_control_groups_quota(tmp_path, monkeypatch, quota, cores):
    path = tmp_path / "cpu.max"
    if quota is not None:
        path.write_text(quota)
    monkeypatch.setattr(processor, "_CGROUP", path)
    assert processor.cores() == (cores or len(os.sched_getaffinity(0)))
