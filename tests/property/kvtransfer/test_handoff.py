"""Both state machines and both arenas, driven through losses, kills and delays in every order Hypothesis can think of.

The network, the transport and the threads are played by this test; the decisions are the real ones. Whatever happened,
nothing may be held in the end, and only a handoff whose every (layer, token) was written may have landed.
"""

from __future__ import annotations

import dataclasses
from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.errors import Overloaded
from baton.layout import KVLayout
from baton.request import TokenEvent
from kvtransfer.arena import ALIGN, Arena
from kvtransfer.coverage import Coverage, Span
from kvtransfer.handoff import Arrived, Bounds, Dispatch, Landed, Leases, Limits
from kvtransfer.protocol import Ack, Begin, Block, Commit, Complete, Drop, Parcel

LAYOUT = KVLayout("m", 2, 1, 8, "float32")
LIMITS = Limits(lease_s=20.0, stall_s=5.0)
BOUNDS = Bounds(lambda codec, count: 64, 2 * ALIGN)
TOKENS, CREDITS, BUDGET_S = 4, 3, 60.0
WHOLE = {(layer, token) for layer in range(LAYOUT.layers) for token in range(TOKENS)}


class Handoffs(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.now, self.peer, self.number = 0.0, 1, 0
        self.start_receiver()
        self.start_sender()

    def start_receiver(self):
        self.leases, self.landing, self.held = Leases(LAYOUT, LIMITS), Arena(3 * ALIGN), {}
        self.fetching, self.fetched, self.aborted = deque(), deque(), []

    def start_sender(self):
        self.staging = Arena(4 * ALIGN)
        self.dispatches, self.plans, self.queued, self.regions, self.told = {}, {}, {}, {}, {}
        self.to_receiver, self.to_sender = deque(), deque()

    # What the edges do once a machine has an outcome.

    def settle_sender(self, name):
        dispatch = self.dispatches[name]
        if dispatch.outcome is not None and self.queued.get(name) is not None:
            self.queued[name] = None
            for region in self.regions.pop(name).values():
                self.staging.free(region)
            if not isinstance(dispatch.outcome, Landed):
                self.to_receiver.append(Drop(name, 1, "over"))

    def settle_receiver(self, lease):
        entry = self.held[lease.request_id]
        if lease.outcome is not None and not entry["told"]:
            entry["told"] = True
            if isinstance(lease.outcome, Landed):
                assert entry["written"] == WHOLE
                self.to_sender.append(Complete(lease.request_id, 1, 0.0, 0.0, 0.0, 1))
            else:
                self.to_sender.append(Drop(lease.request_id, 1, "over"))

    # The prefill worker.

    @rule()
    def open(self):
        name = f"r{self.number}"
        self.number += 1
        try:
            lease = self.leases.reserve(
                name, 1, tokens=TOKENS, codec="raw", budget_s=BUDGET_S, capacity=CREDITS, now=self.now
            )
        except Overloaded:
            assert self.leases.active == CREDITS
            return
        self.held[name] = {"lease": lease, "written": set(), "told": False}
        self.dispatches[name] = Dispatch(name, 1, Coverage(LAYOUT.layers, TOKENS), self.now + BUDGET_S)
        self.plans[name] = [Span(layer, start, 2) for start in (0, 2) for layer in range(LAYOUT.layers)]
        self.queued[name], self.regions[name], self.told[name] = deque(), {}, 0
        self.to_receiver.append(Begin(name, 1, TOKENS, "raw"))

    @precondition(lambda self: self.dispatches)
    @rule(data=st.data(), wild=st.integers(0, 15))
    def push_or_finish(self, data, wild):
        self._push_or_finish(data.draw(st.sampled_from(sorted(self.dispatches))), wild)

    def _push_or_finish(self, name, wild):
        dispatch, plan = self.dispatches[name], self.plans[name]
        if wild == 0:
            dispatch.finish(TokenEvent(name, 0, 1), self.now)
        elif plan:
            span = plan[0] if wild == 1 else plan.pop(0)  # 1: this one will come twice
            if dispatch.push(span):
                self.queued[name].append(span)
        elif dispatch.first is None:
            dispatch.finish(TokenEvent(name, 0, 1), self.now)
        self.settle_sender(name)

    @precondition(lambda self: any(self.queued.values()))
    @rule(data=st.data(), wild=st.integers(0, 20), most=st.integers(1, 2))
    def encode(self, data, wild, most):
        name = data.draw(st.sampled_from(sorted(name for name, spans in self.queued.items() if spans)))
        self._encode(name, wild, most)

    def _encode(self, name, wild, most):
        """A parcel of up to ``most`` blocks."""
        spans = list(self.queued[name])[:most]
        region = self.staging.allocate(len(spans) * ALIGN)
        if region is None:
            return
        for _ in spans:
            self.queued[name].popleft()
        seq = self.dispatches[name].staged(len(spans), work_s=0.1, now=self.now)
        self.regions[name][seq] = region
        blocks = [Block(span.layer, span.start, span.count, 64, b"d" * 16) for span in spans]
        if wild == 0:
            blocks[0] = dataclasses.replace(blocks[0], layer=blocks[0].layer ^ 1)
        self.to_receiver.append(Parcel(name, 1, seq, "raw", region.offset, tuple(blocks)))
        self.told[name] += 1

    @precondition(lambda self: self.dispatches)
    @rule(data=st.data())
    def commit(self, data):
        self._commit(data.draw(st.sampled_from(sorted(self.dispatches))))

    def _commit(self, name):
        commit = self.dispatches[name].commit(self.told[name])
        if commit is not None:
            self.to_receiver.append(commit)

    @precondition(lambda self: self.to_sender)
    @rule()
    def hear_receiver(self):
        record = self.to_sender.popleft()
        dispatch = self.dispatches.get(record.request_id)
        if dispatch is None or dispatch.outcome is not None:
            return
        match record:
            case Ack():
                if dispatch.ack(record.seq):
                    self.staging.free(self.regions[record.request_id].pop(record.seq))
            case Complete():
                dispatch.complete(record)
                assert isinstance(dispatch.outcome, Landed)
            case Drop():
                dispatch.lose(record.reason)
        self.settle_sender(record.request_id)

    # The decode worker.

    @precondition(lambda self: self.to_receiver)
    @rule(steps=st.integers(1, 4))
    def hear_sender(self, steps):
        self.leases.hear(self.peer, self.now)
        for record in [self.to_receiver.popleft() for _ in range(min(steps, len(self.to_receiver)))]:
            lease = self.leases.find(record.request_id, record.epoch, self.peer)
            if lease is None:
                continue
            match record:
                case Begin():
                    lease.begin(self.peer, record, self.now)
                case Parcel():
                    if lease.announce(record, self.now, BOUNDS):
                        self.fetching.append(record)
                case Commit():
                    lease.commit(record, self.now)
                case Drop():
                    lease.lose(record.reason)
            self.settle_receiver(lease)

    @precondition(lambda self: self.fetching)
    @rule(wild=st.integers(0, 12))
    def fetch(self, wild):
        parcel = self.fetching[0]
        region = self.landing.allocate(parcel.nbytes)
        if region is None:
            return
        self.fetching.popleft()
        if wild == 0:  # the transfer is abandoned and may still write: all of this peer is lost
            self.landing.quarantine(region)
            self.aborted.append(region)
            self.lose_link()
        else:
            self.fetched.append((parcel, region))

    @precondition(lambda self: self.fetched)
    @rule(corrupt=st.integers(0, 15))
    def land(self, corrupt):
        parcel, region = self.fetched.popleft()
        self.landing.free(region)
        entry = self.held.get(parcel.request_id)
        if entry is None or entry["lease"].outcome is not None:
            return  # the gate is closed
        lease = entry["lease"]
        if corrupt == 0:
            lease.lose("digest mismatch")
        else:
            for block in parcel.blocks:
                pairs = {(block.layer, token) for token in range(block.start, block.start + block.count)}
                assert not pairs & entry["written"]
                entry["written"] |= pairs
            self.to_sender.append(Ack(parcel.request_id, 1, parcel.seq))
            lease.landed(Arrived(parcel.seq, parcel.nbytes, self.now, self.now, 0.1), self.now)
        self.settle_receiver(lease)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        name = data.draw(st.sampled_from(sorted(self.held)))
        lease = self.held[name]["lease"]
        lease.lose("released")
        self.settle_receiver(lease)
        self.leases.forget(lease)
        del self.held[name]

    # The world.

    @rule(steps=st.integers(1, 12))
    def flow(self, steps):
        """Everything goes well for a while, without which hardly anything would ever land."""
        for _ in range(steps):
            for name in self.dispatches:
                self._push_or_finish(name, wild=15)
                if self.queued[name]:
                    self._encode(name, wild=20, most=2)
                self._commit(name)
            if self.to_receiver:
                self.hear_sender(4)
            for _ in range(len(self.fetching)):
                self.fetch(12)  # as far as there is room
            while self.fetched:
                self.land(15)
            while self.to_sender:
                self.hear_receiver()

    def lose_link(self):
        """The connection is gone: both sides lose what was on it."""
        for lease in self.leases.of_peer(self.peer):
            lease.lose("link")
        self.leases.gone(self.peer)
        self.peer += 1
        for name, dispatch in self.dispatches.items():
            dispatch.lose("link")
            self.settle_sender(name)
        self.to_receiver.clear()
        self.to_sender.clear()
        self.fetching.clear()

    @rule(which=st.sampled_from(["link", "sender", "receiver"]))
    def break_something(self, which):
        self.lose_link()
        if which == "sender":  # its memory is gone, and so are the transfers out of it
            self.start_sender()
            self.end_transfers()
        elif which == "receiver":
            self.start_receiver()

    def end_transfers(self):
        for region in self.aborted:
            self.landing.free(region)
        self.aborted.clear()

    @rule(seconds=st.sampled_from([0.5, 3.0, 30.0]))
    def wait(self, seconds):
        self.now += seconds
        for lease in self.leases.tick(self.now):
            self.settle_receiver(lease)
        for name, dispatch in self.dispatches.items():
            dispatch.tick(self.now)
            self.settle_sender(name)

    @invariant()
    def buffers_are_held_by_somebody(self):
        assert self.landing.used_bytes == sum(region.nbytes for _, region in self.fetched)
        assert self.landing.quarantined_bytes == sum(region.nbytes for region in self.aborted)
        staged = [region for held in self.regions.values() for region in held.values()]
        assert self.staging.used_bytes == sum(region.nbytes for region in staged)
        assert self.leases.active <= CREDITS

    def teardown(self):
        self.lose_link()
        self.wait(BUDGET_S)
        while self.fetched:
            self.land(1)
        self.end_transfers()
        for name in list(self.held):
            lease = self.held[name]["lease"]
            assert lease.outcome is not None
            self.leases.forget(lease)
        assert (self.leases.active, self.landing.used_bytes, self.landing.quarantined_bytes) == (0, 0, 0)
        assert self.staging.used_bytes == 0
        assert all(dispatch.outcome is not None for dispatch in self.dispatches.values())


TestHandoffs = Handoffs.TestCase
TestHandoffs.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
