"""The whole engine under random load: every answer is what it would have been undisturbed, cached prefixes or not."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.errors import Overloaded
from baton.request import Sampling, TokenEvent, Work
from engine.engine import Engine
from engine.model import Model

if TYPE_CHECKING:
    from tests.unit.engine.conftest import Harness

PREFIXES = 3
LENGTHS = (1, 3, 4, 8, 9, 12, 17)  # with pages of four tokens: below, at and above a page's end


@dataclass
class Client:
    """Sends requests to one engine, takes handoffs in and gives up at random; keeps what came back."""

    engine: Engine
    source: Engine  # prefills what is handed over
    harness: Harness
    dice: random.Random
    works: dict[str, Work] = field(default_factory=dict)
    events: dict[str, list[TokenEvent]] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)

    def act(self, action: str) -> None:
        match action:
            case "add":
                work = self._work()
                with contextlib.suppress(Overloaded):
                    self.engine.add(work)
                    self.works[work.request_id] = work
            case "land":
                with contextlib.suppress(Overloaded):
                    self._land(self._work())
            case "cancel" if self.works:
                name = self.dice.choice(sorted(self.works))
                if self.engine.release(name):
                    self.cancelled.add(name)
            case _:
                self._step()

    def finish(self) -> None:
        for _ in range(3000):
            if not self.engine.has_work:
                return
            self._step()
        raise AssertionError("some sequence starved")

    def _step(self) -> None:
        for event in self.engine.step():
            self.events.setdefault(event.request_id, []).append(event)
        self.engine.check_integrity()

    def _work(self) -> Work:
        name = f"r{len(self.works)}"
        prompt = self.harness.prompt(self.dice.choice(LENGTHS), seed=self.dice.randrange(PREFIXES))
        sampling = Sampling(temperature=0.0, max_tokens=self.dice.choice((1, 2, 5, 11)))
        return self.harness.work(name, prompt, sampling, priority=self.dice.choice((0, 0, 1)))

    def _land(self, work: Work) -> None:
        """The way of a handoff: prefill elsewhere, KV written into reserved pages, decode here."""
        pages = self.engine.reserve(work)
        self.works[work.request_id] = work
        self.source.add(work, prefill_only=True)
        [first] = self.harness.run(self.source)[work.request_id]
        held = self.source._scheduler._sequences[work.request_id].pages
        for layer in range(self.source.layout.layers):
            self.engine.cache.scatter(layer, pages, 0, *self.source.cache.gather(layer, held, 0, len(work.prompt)))
        self.source.release(work.request_id)
        self.engine.start(work.request_id, first)
        self.events[work.request_id] = [first]


@pytest.mark.parametrize("prefix_cache", [True, False])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    actions=st.lists(
        st.sampled_from(["add", "add", "land", "cancel", "step", "step", "step"]), min_size=20, max_size=60
    ),
    pages=st.integers(8, 20),
    step_tokens=st.integers(3, 20),
    seed=st.integers(0, 2**16),
)
def test_disturbed_answers_equal_undisturbed_ones(
    tiny: Model, harness: Harness, *, prefix_cache: bool, actions: list[str], pages: int, step_tokens: int, seed: int
) -> None:
    def engine(pages: int) -> Engine:
        return harness.engine(tiny, pages=pages, step_tokens=step_tokens, max_running=5, prefix_cache=prefix_cache)

    client = Client(engine(pages), engine(64), harness, random.Random(seed))
    for action in actions:
        client.act(action)
    client.finish()
    for name, work in client.works.items():
        tokens = harness.tokens(client.events[name]) if name in client.events else []
        expected = undisturbed(tiny, harness, work)
        assert tokens == expected[: len(tokens)]
        assert len(tokens) == len(expected) or name in client.cancelled
    load = client.engine.load()
    assert (load.pages_used, load.running, load.waiting, load.waiting_tokens) == (0, 0, 0, 0)
    assert prefix_cache or load.pages_cached == load.hit_tokens == 0


ANSWERS: dict[tuple[int, ...], list[int]] = {}


def undisturbed(model: Model, harness: Harness, work: Work) -> list[int]:
    """The answer of an engine that has nothing else to do and no prefix cache; of one length, each asked once."""
    if work.prompt not in ANSWERS:
        alone = harness.engine(model, prefix_cache=False)
        alone.add(harness.work("alone", work.prompt))
        ANSWERS[work.prompt] = harness.tokens(harness.run(alone)["alone"])
    return ANSWERS[work.prompt][: work.sampling.max_tokens]
