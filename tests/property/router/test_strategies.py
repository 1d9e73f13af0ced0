"""What every strategy promises, whatever the workers hold."""

from __future__ import annotations

from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from baton.config_routing import Strategy
from baton.messages import Load
from router.policy import Prompt, WorkerView
from router.strategies import choose_decode, choose_prefill, predicted_s, rendezvous

NAMES = ("a", "b", "c", "d", "e")
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@st.composite
def pools(draw: st.DrawFn) -> list[WorkerView]:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    return [_worker(draw, name) for name in names]


def _worker(draw: st.DrawFn, name: str) -> WorkerView:
    count = st.integers(0, 5)
    load = Load(
        waiting=draw(count),
        waiting_tokens=draw(st.integers(0, 3000)),
        running=draw(count),
        pages_used=draw(st.integers(0, 100)),
        pages_total=100,
        handoffs=draw(count),
        buffer_bytes_used=0,
        buffer_bytes_total=0,
        buffer_bytes_quarantined=0,
        prompt_token_s=draw(st.sampled_from((0.0, 0.001, 0.002, 0.01))),
    )
    return WorkerView(name, load, draw(count), draw(st.integers(0, 500)), draw(st.integers(0, 500)))


prompts = st.builds(
    Prompt,
    tokens=st.integers(1, 2000),
    held=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 30).map(lambda blocks: 64 * blocks)),
    first=st.integers(0, 5),
    session=st.sampled_from(("", "s", "t")),
    turn=st.integers(0, 1000),
)
factors = st.sampled_from((1.0, 1.5, 4.0))


@given(pools(), prompts, factors, st.randoms())
def test_a_choice_is_one_of_the_workers_and_their_order_does_not_matter(
    pool: list[WorkerView], prompt: Prompt, factor: float, random: object
) -> None:
    shuffled = sorted(pool, key=lambda worker: random.random())  # type: ignore[attr-defined]
    for strategy in STRATEGIES:
        chosen = choose_prefill(strategy, pool, prompt, factor=factor)
        assert chosen in {worker.worker_id for worker in pool}
        assert chosen == choose_prefill(strategy, shuffled, prompt, factor=factor)
        decode = choose_decode(strategy, pool, prompt, factor=factor, page_tokens=16)
        assert decode == choose_decode(strategy, shuffled, prompt, factor=factor, page_tokens=16)
        fitting = {worker.worker_id for worker in pool if worker.fits(prompt.tokens, 16)}
        assert decode in (fitting or {worker.worker_id for worker in pool})


@given(pools(), prompts, factors)
def test_affinity_never_costs_more_than_the_factor_and_never_ignores_a_better_holder(
    pool: list[WorkerView], prompt: Prompt, factor: float
) -> None:
    predicted = predicted_s(pool, prompt)
    least = choose_prefill("least_ttft", pool, prompt, factor=factor) or ""
    chosen = choose_prefill("prefix_affinity", pool, prompt, factor=factor) or ""
    assert predicted[least] == min(predicted.values())
    assert predicted[chosen] <= factor * predicted[least]
    for name, seconds in predicted.items():
        if prompt.held.get(name, 0) > prompt.held.get(chosen, 0):
            assert chosen == least
            holders = [other for other in predicted if prompt.held.get(other, 0) >= prompt.held[name]]
            assert seconds > factor * predicted[least] or any(
                prompt.held[other] > prompt.held[name] for other in holders
            )


@given(pools(), st.text(max_size=4), st.data())
def test_a_worker_that_goes_moves_only_its_own_keys(pool: list[WorkerView], key: str, data: st.DataObject) -> None:
    home = rendezvous(pool, key)
    gone = data.draw(st.sampled_from(pool))
    rest = [worker for worker in pool if worker is not gone]
    if rest:
        assert (rendezvous(rest, key) == home) == (gone.worker_id != home)


@given(pools(), prompts, factors)
def test_decode_affinity_keeps_batches_balanced(pool: list[WorkerView], prompt: Prompt, factor: float) -> None:
    chosen = choose_decode("prefix_affinity", pool, prompt, factor=factor, page_tokens=16)
    batches = {worker.worker_id: worker.sequences for worker in pool}
    roomy = [worker for worker in pool if worker.fits(prompt.tokens, 16)] or pool
    assert batches[chosen or ""] <= factor * min(worker.sequences for worker in roomy) + 1
