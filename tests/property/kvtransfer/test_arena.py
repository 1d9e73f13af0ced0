"""The allocator and the coverage against the plainest models of them."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtransfer.arena import ALIGN, Arena
from kvtransfer.coverage import Coverage, Span

TOTAL = 32 * ALIGN


class ArenaModel(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.arena = Arena(TOTAL)
        self.used, self.quarantined = [], []

    def cells(self):
        return [cell for r in self.used + self.quarantined for cell in range(r.offset, r.offset + r.nbytes, ALIGN)]

    @rule(nbytes=st.integers(1, TOTAL + ALIGN))
    def allocate(self, nbytes):
        taken = set(self.cells())
        region = self.arena.allocate(nbytes)
        need = -(-nbytes // ALIGN)
        fits = [
            start for start in range(TOTAL // ALIGN - need + 1)
            if not taken & {ALIGN * cell for cell in range(start, start + need)}
        ]  # fmt: skip
        if region is None:
            assert not fits
        else:
            assert region.offset == ALIGN * fits[0]
            self.used.append(region)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def shrink(self, data):
        at = data.draw(st.integers(0, len(self.used) - 1))
        self.used[at] = self.arena.shrink(self.used[at], data.draw(st.integers(1, self.used[at].nbytes)))

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def quarantine(self, data):
        region = self.used.pop(data.draw(st.integers(0, len(self.used) - 1)))
        self.arena.quarantine(region)
        self.quarantined.append(region)

    @precondition(lambda self: self.used or self.quarantined)
    @rule(data=st.data())
    def free(self, data):
        held = data.draw(st.sampled_from([part for part in (self.used, self.quarantined) if part]))
        self.arena.free(held.pop(data.draw(st.integers(0, len(held) - 1))))

    @invariant()
    def counts_and_regions_agree(self):
        cells = self.cells()
        assert len(cells) == len(set(cells))
        assert self.arena.used_bytes == sum(region.nbytes for region in self.used)
        assert self.arena.quarantined_bytes == sum(region.nbytes for region in self.quarantined)

    def teardown(self):
        for region in self.used + self.quarantined:
            self.arena.free(region)
        assert self.arena.allocate(TOTAL) is not None


TestArena = ArenaModel.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

spans = st.builds(Span, st.integers(-1, 3), st.integers(-1, 12), st.integers(-1, 12))


@settings(max_examples=300, deadline=None)
@given(st.lists(spans, max_size=60))
def test_coverage_is_a_set_of_pairs(pushed):
    coverage, seen = Coverage(3, 12), set()
    everything = {(layer, token) for layer in range(3) for token in range(12)}
    for span in pushed:
        pairs = {(span.layer, token) for token in range(span.start, span.start + span.count)}
        fits = bool(pairs) and pairs <= everything and not pairs & seen
        assert (coverage.add(span) == "") == fits
        seen |= pairs if fits else set()
        assert coverage.missing == len(everything - seen)
