"""Taking runs of decode steps as a whole changes nothing: same times to the last bit, failures and scaling included."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.config_admission import AdmissionConfig, ClassConfig
from placement.cluster import Change, Cluster, Pool
from placement.host import SharedMachine
from placement.linear import LinearCost
from placement.outcome import End, Outcome
from placement.replica import EngineLimits
from placement.simulator import simulate
from placement.workload import Arrival

LENGTHS = st.tuples(st.floats(0, 0.4), st.integers(1, 400), st.integers(1, 60))
COSTS = st.builds(
    LinearCost,
    base_s=st.sampled_from([0.0, 0.01, 0.013]),
    prefill_token_s=st.sampled_from([1e-5, 3.3e-4]),
    sequence_s=st.sampled_from([0.0, 1e-4]),
    context_token_s=st.sampled_from([1e-6, 7e-6]),
    transfer_token_s=st.sampled_from([0.0, 1e-4]),
    exposed=st.sampled_from([0.1, 1.0]),
    capacity_tokens=st.sampled_from([480, 1024, 16384]),
)
LIMITS = st.builds(
    EngineLimits,
    page_tokens=st.sampled_from([1, 16, 64]),
    step_tokens=st.sampled_from([8, 128, 1024]),
    max_running=st.sampled_from([1, 3, 64]),
    max_waiting=st.sampled_from([4, 4096]),
    mixed_tokens=st.sampled_from([0, 24, 1 << 20]),
    gap_s=st.sampled_from([0.0, 0.03]),
)
CHANGES = st.lists(
    st.builds(
        Change,
        at_s=st.floats(0, 4),
        role=st.sampled_from(["prefill", "decode"]),
        kind=st.sampled_from(["kill", "return", "grow"]),
        index=st.integers(0, 1),
    ),
    max_size=3,
)


WAYS_IN = st.sampled_from(
    [
        None,
        AdmissionConfig(),
        AdmissionConfig(lead_ms=20.0, classes={"standard": ClassConfig(ttft_ms=300.0, tpot_ms=40.0)}),
    ]
)


def summary(outcome: Outcome) -> list[tuple[object, ...]]:
    return [(t.end, t.sent, t.attempts, t.queue_s, t.handoff_s, repr(t.first_token_s), repr(t.last_token_s))
            for t in outcome.trips]  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lengths=st.lists(LENGTHS, min_size=1, max_size=25), costs=st.tuples(COSTS, COSTS), limits=LIMITS,
       changes=CHANGES, kind=st.tuples(st.booleans(), st.booleans()), way_in=WAYS_IN,
       blocks=st.lists(st.integers(0, 3), min_size=1, max_size=25))  # fmt: skip
def test_runs_equal_single_steps(
    *,
    lengths: list[tuple[float, int, int]], costs: tuple[LinearCost, LinearCost], limits: EngineLimits,
    changes: list[Change], kind: tuple[bool, bool], way_in: AdmissionConfig | None, blocks: list[int],
) -> None:  # fmt: skip
    (prefill, decode), (split, local) = costs, kind
    arrivals, at_s = [], 0.0
    for index, (gap_s, prompt, output) in enumerate(lengths):
        at_s += gap_s
        prefix = blocks[index % len(blocks)]  # 0: nothing is known of the prompt
        arrivals.append(
            Arrival(at_s, prompt, output, tuple(8 * prefix + n for n in range(-(-prompt // 64) * (prefix > 0))))
        )
    cluster = Cluster(
        decode=Pool(decode, 2, limits),
        prefill=Pool(prefill, 2, limits) if split else None,
        local_prefill=local,
        admission=way_in,
    )
    kept = [change for change in changes if split or change.role == "decode"]
    fast = simulate(cluster, arrivals, changes=kept, block_tokens=64)
    slow = simulate(cluster, arrivals, changes=kept, block_tokens=64, fast=False)
    assert summary(fast) == summary(slow)
    for ours, theirs in zip(fast.workers.values(), slow.workers.values(), strict=True):
        assert (ours.steps, ours.preemptions, ours.hit_tokens) == (theirs.steps, theirs.preemptions, theirs.hit_tokens)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(LENGTHS, min_size=1, max_size=25), cost=COSTS, limits=LIMITS)
def test_every_request_ends_with_all_its_tokens_or_is_refused(
    lengths: list[tuple[float, int, int]], cost: LinearCost, limits: EngineLimits
) -> None:
    arrivals = [Arrival(index * 0.1, prompt, output) for index, (_, prompt, output) in enumerate(lengths)]
    cluster = Cluster(decode=Pool(cost, 1, limits), prefill=Pool(cost, 2, limits))
    for trip in simulate(cluster, arrivals).trips:
        assert trip.end in (End.FINISHED, End.REFUSED)
        if trip.end is End.FINISHED:
            assert trip.sent == trip.output_tokens
            assert trip.arrived_s <= trip.first_token_s <= trip.last_token_s


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lengths=st.lists(LENGTHS, min_size=1, max_size=25), cost=COSTS, limits=LIMITS, split=st.booleans(),
       token_s=st.sampled_from([0.0, 1e-3]))  # fmt: skip
def test_runs_equal_single_steps_where_workers_slow_each_other(
    *, lengths: list[tuple[float, int, int]], cost: LinearCost, limits: EngineLimits, split: bool, token_s: float
) -> None:
    """But for the last bits: what ends at the same instant may do so in another order."""
    arrivals = [Arrival(0.11 * index, prompt, output) for index, (_, prompt, output) in enumerate(lengths)]
    pool = Pool(cost, 1 if split else 2, limits)
    machine = SharedMachine(cores=2 / 1.37, request_s=10 * token_s, token_s=token_s)
    cluster = Cluster(decode=pool, prefill=pool if split else None, machine=machine)
    fast, slow = simulate(cluster, arrivals), simulate(cluster, arrivals, fast=False)
    for ours, theirs in zip(fast.trips, slow.trips, strict=True):
        assert ours.end is theirs.end
        if ours.end is End.FINISHED:
            assert ours.first_token_s == pytest.approx(theirs.first_token_s, abs=1e-6)
            assert ours.last_token_s == pytest.approx(theirs.last_token_s, abs=1e-6)
