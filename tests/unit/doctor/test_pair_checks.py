"""What the doctor makes of workers and of handoffs between them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from baton.wire import inference_pb2 as pb
from deploy.doctor import pair_checks as checks
from deploy.doctor.facts import Direction, Pair
from deploy.doctor.findings import Finding

OVER_TCP = {"tcp_bytes": 33 << 20, "carrier": "tcp/eth0 (inter-node, software emulation)"}
FAR = {"boot_id": "b2", "hostname": "node2"}
RDMA = {"rdma_devices": ("mlx5_0",)}


def helps(finding: Finding | None) -> str:
    assert finding is not None
    assert bool(finding.why) == bool(finding.fix) == (finding.status != "ok"), finding
    return finding.status


def transport(pair: Pair, configured: str = "nixl") -> Finding:
    (finding,) = (one for one in checks.pair(pair, configured) if one.check == "transport")
    helps(finding)
    return finding


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (pb.WORKER_STATE_READY, "ok"), (pb.WORKER_STATE_DRAINING, "warn"), (pb.WORKER_STATE_CONNECTING, "fail"),
        (pb.WORKER_STATE_LOST, "fail"), (pb.WORKER_STATE_SUSPECT, "warn"),
    ],
)  # fmt: skip
def test_state(state: pb.WorkerState, status: str) -> None:
    assert helps(checks.state("decode w", state)) == status


def test_an_empty_pool_fails() -> None:
    assert helps(checks.empty("decode")) == "fail"


def test_reached(sound: Any) -> None:
    assert helps(checks.reached(sound.worker())) == "ok"
    lost = checks.reached(sound.worker(error="cannot connect", hello=None, host=None))
    assert helps(lost) == "fail"
    assert "nc -vz 10.0.0.1 700" in lost.fix


@pytest.mark.parametrize(
    ("ahead_s", "rtt_s", "status"),
    [
        (0.0, 0.001, "ok"), (0.9, 0.0, "ok"), (-0.9, 0.0, "ok"), (1.5, 1.2, "ok"), (1.5, 0.1, "warn"),
        (-2.0, 0.0, "warn"), (299.0, 0.0, "warn"), (300.0, 0.0, "fail"), (-4000.0, 0.0, "fail"),
    ],
)  # fmt: skip
def test_clock_skew_beyond_the_round_trip(sound: Any, ahead_s: float, rtt_s: float, status: str) -> None:
    finding = checks.clock(sound.worker(ahead_s=ahead_s, rtt_s=rtt_s))
    assert helps(finding) == status
    assert finding is not None
    if status != "ok":
        assert ("ahead" if ahead_s > 0 else "behind") in finding.found


def test_no_clock_of_a_worker_that_did_not_answer(sound: Any) -> None:
    assert checks.clock(sound.worker(error="gone", host=None)) is None


def test_versions(sound: Any) -> None:
    one, other = sound.worker(name="a"), sound.worker(name="b")
    assert [helps(finding) for finding in checks.versions([one, other])] == ["ok"]
    assert checks.versions([sound.worker(host=None, error="gone")]) == []
    newer = replace(other, host=sound.host(packages={"baton": "0.1.0", "torch": "2.14.0"}, python="3.12.1"))
    told = checks.versions([one, newer])
    assert [finding.subject for finding in told] == ["python", "torch"]
    assert "2.13.0 on a; 2.14.0 on b" in told[1].found
    assert {helps(finding) for finding in told} == {"warn"}


def test_a_sound_pair(sound: Any) -> None:
    found = checks.pair(sound.pair(sound.direction(), sound.direction("int8")), "nixl")
    assert [one.check for one in found] == ["layout", "handoff, raw", "handoff, int8", "transport", "handoff, raw"]
    assert {helps(one) for one in found} == {"ok"}
    assert found[-1].subject == "decode w -> prefill w"
    assert "1.68 GB/s" in found[1].found
    assert "10.0 ms" in found[1].found


def test_layouts_that_differ_end_it(sound: Any) -> None:
    pair = sound.pair()
    other = replace(pair.decode, hello=replace(pair.decode.hello, layout="layout2"))
    (finding,) = checks.pair(replace(pair, decode=other), "nixl")
    assert helps(finding) == "fail"
    assert "layout1 and layout2" in finding.found
    assert "sha256sum" in finding.fix


def test_dtypes_may_differ(sound: Any) -> None:
    pair = sound.pair()
    half = replace(pair.decode, hello=replace(pair.decode.hello, dtype="bfloat16"))
    finding = checks.pair(replace(pair, decode=half), "nixl")[0]
    assert helps(finding) == "ok"
    assert "float32, landing as bfloat16" in finding.found


def test_a_worker_that_did_not_answer_is_not_blamed_twice(sound: Any) -> None:
    pair = sound.pair()
    assert checks.pair(replace(pair, decode=replace(pair.decode, error="gone", hello=None)), "nixl") == []


def test_handoffs_that_failed(sound: Any) -> None:
    pair = sound.pair()
    busy = checks.handoff(Direction("raw", error="3 requests wait here", busy=True), pair, "a -> b")
    assert helps(busy) == "warn"
    lost = checks.handoff(Direction("raw", error="the handoff was lost"), pair, "a -> b")
    assert helps(lost) == "fail"
    assert "ping 10.0.0.1" in lost.fix
    assert helps(checks.handoff(Direction("raw"), pair, "a -> b")) == "fail"
    assert helps(checks.handoff(sound.direction(exact=False), pair, "a -> b")) == "fail"
    assert helps(checks.handoff(sound.direction("int4", exact=False), pair, "a -> b")) == "ok", "lossy by design"


def test_a_slow_link_is_told(sound: Any) -> None:
    fast = sound.direction()
    slow = replace(fast, sent=replace(fast.sent, seconds=fast.sent.kv_bytes / 124e6))
    assert helps(checks.handoff(slow, sound.pair(), "a -> b")) == "warn"
    assert helps(checks.handoff(replace(slow, codec="auto"), sound.pair(), "a -> b")) == "ok", "too small to judge"
    just = replace(fast, sent=replace(fast.sent, seconds=fast.sent.kv_bytes / 126e6))
    assert helps(checks.handoff(just, sound.pair(), "a -> b")) == "ok"


def test_another_transport_than_the_configured_one_fails(sound: Any) -> None:
    for configured, used in itertools.permutations(("nixl", "tcp", "gloo"), 2):
        finding = transport(sound.pair(sound.direction(transport=used)), configured)
        assert finding.status == "fail"
        assert f"{used}, configured: {configured}" in finding.found
    assert transport(sound.pair(sound.direction(transport="tcp", **OVER_TCP)), "tcp").status == "ok"


def test_shared_memory_in_use_is_named(sound: Any) -> None:
    assert transport(sound.pair()).found == "nixl: cma/memory (intra-node, zero-copy)"
    assert "shared memory" in transport(sound.pair(sound.direction(carrier=""))).found


def test_tcp_where_shared_memory_is_possible_is_a_silent_fallback(sound: Any) -> None:
    finding = transport(sound.pair(sound.direction(**OVER_TCP)))
    assert finding.status == "fail"
    assert "shared memory is possible" in finding.found
    only_counted = transport(sound.pair(sound.direction(tcp_bytes=33 << 20)))
    assert only_counted.status == "fail", "the kernel's count is believed over a library's word"
    only_said = transport(sound.pair(sound.direction(carrier="tcp/lo (intra-node)")))
    assert only_said.status == "fail"


def test_tcp_where_rdma_is_possible_is_a_silent_fallback(sound: Any) -> None:
    far = sound.pair(sound.direction(**OVER_TCP), prefill=sound.host(**RDMA), decode=sound.host(**RDMA, **FAR))
    finding = transport(far)
    assert finding.status == "fail"
    assert "RDMA is possible" in finding.found
    assert "ulimit -l unlimited" in finding.fix


def test_tcp_where_nothing_else_is_possible_is_right(sound: Any) -> None:
    for prefill, decode in (({}, FAR), (RDMA, FAR), ({}, FAR | RDMA)):
        pair = sound.pair(sound.direction(**OVER_TCP), prefill=sound.host(**prefill), decode=sound.host(**decode))
        assert transport(pair).status == "ok"


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ("tcp", "ok"), ("tcp,self", "ok"), ("cma", "fail"), ("rc,self", "fail"), ("^tcp", "fail"),
        ("^rc", "fail"), ("all", "fail"), ("tcp,cma", "fail"), ("", "fail"),
    ],
)  # fmt: skip
def test_what_ucx_was_told_against_tcp_in_use(sound: Any, asked: str, status: str) -> None:
    host = sound.host(ucx={"UCX_TLS": asked} if asked else {})
    finding = transport(sound.pair(sound.direction(**OVER_TCP), prefill=host, decode=host))
    assert finding.status == status
    if asked in ("cma", "rc,self", "^tcp"):
        assert f"although UCX_TLS={asked}" in finding.found


@pytest.mark.parametrize(
    ("one", "other", "way"),
    [
        ({}, {}, "shared memory"),
        ({}, {"boot_id": "b2"}, ""),
        ({"boot_id": ""}, {"boot_id": ""}, ""),
        ({}, {"pid_namespace": "pid:[2]"}, ""),
        ({}, {"user_id": 7}, ""),
        ({"ptrace_scope": 1}, {"ptrace_scope": 1}, ""),
        ({"ptrace_scope": 1, "user_id": 0}, {"ptrace_scope": 1, "user_id": 0}, "shared memory"),
        (RDMA, RDMA, "shared memory"),
        (RDMA, {**RDMA, "pid_namespace": "pid:[2]"}, "RDMA"),
        (RDMA, {**RDMA, **FAR}, "RDMA"),
        (RDMA, FAR, ""),
    ],
)
def test_the_fastest_way_between_two_processes(
    sound: Any, one: dict[str, Any], other: dict[str, Any], way: str
) -> None:
    assert checks.faster(sound.host(**one), sound.host(**other)) == way
    assert checks.faster(sound.host(**other), sound.host(**one)) == way
