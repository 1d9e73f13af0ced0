"""The index of cached prefixes against brute force: under random events, and behind real schedulers' caches."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.blocks import BLOCK_TOKENS, BlockChain, BlockJournal, block_names
from baton.messages import CacheEvents
from baton.request import Sampling, Work
from engine.active import Active
from engine.pages import PagePool
from engine.prefix import Key, PageName
from engine.scheduler import Scheduler
from engine.sequence import Job
from router.prefix_index import EXPECTED_S, PrefixIndex

WORKERS, BLOCKS = ("a", "b", "c"), range(1, 5)
blocks = st.lists(st.sampled_from(BLOCKS), max_size=4, unique=True)
steps = st.lists(
    st.tuples(
        st.sampled_from(("told", "told", "reset", "gap", "forget", "expect", "wait")),
        st.sampled_from(WORKERS),
        blocks,
        blocks,
    ),
    min_size=5,
    max_size=40,
)


class Model:
    """What each worker holds as plain sets; everything is looked through for every question."""

    def __init__(self) -> None:
        self.held: dict[str, set[int]] = {}
        self.expected: dict[tuple[str, int], float] = {}
        self.now_s = 0.0

    def told(self, worker: str, added: list[int], removed: list[int]) -> None:
        self.held[worker] -= set(removed)
        self.held[worker] |= set(added)
        for block in added:
            self.expected.pop((worker, block), None)

    def forget(self, worker: str) -> None:
        self.held.pop(worker, None)
        self.expected = {key: until_s for key, until_s in self.expected.items() if key[0] != worker}

    def expect(self, worker: str, prompt: list[int]) -> None:
        for block in prompt if worker in self.held else ():
            if block not in self.held[worker]:
                self.expected[worker, block] = self.now_s + EXPECTED_S

    def match(self, prompt: tuple[int, ...]) -> dict[str, int]:
        tokens = {}
        for worker, held in self.held.items():
            depth = 0
            while depth < len(prompt) and (
                prompt[depth] in held or self.expected.get((worker, prompt[depth]), 0.0) > self.now_s
            ):
                depth += 1
            tokens[worker] = depth * BLOCK_TOKENS
        return tokens


@settings(max_examples=200)
@given(steps, st.lists(blocks, min_size=3, max_size=3), st.lists(st.permutations(BLOCKS), min_size=2, max_size=4))
def test_the_index_is_what_brute_force_says(
    script: list[tuple[str, str, list[int], list[int]]], first: list[list[int]], prompts: list[list[int]]
) -> None:
    index, model, sequences = PrefixIndex(), Model(), dict.fromkeys(WORKERS, 0)
    begin = [("reset", worker, held, held) for worker, held in zip(WORKERS, first, strict=True)]
    for kind, worker, added, removed in (*begin, *script):
        removed = [block for block in removed if block not in added]
        match kind:
            case "told" | "gap":
                sequences[worker] += 1 if kind == "told" else 2
                taken = index.apply(worker, CacheEvents(sequences[worker], False, tuple(added), tuple(removed)))
                assert taken == (kind == "told" and worker in model.held)
                model.told(worker, added, removed) if taken else model.forget(worker)
            case "reset":
                assert index.apply(worker, CacheEvents(sequences[worker], True, tuple(added), ()))
                model.forget(worker)
                model.held[worker] = set(added)
            case "forget":
                index.forget(worker)
                model.forget(worker)
            case "expect":
                index.expect(worker, added, model.now_s)
                model.expect(worker, added)
            case "wait":
                model.now_s += EXPECTED_S * len(added) / 3
        for prompt in prompts:
            assert index.match(prompt, model.now_s) == model.match(tuple(prompt))
    for worker in WORKERS:
        index.forget(worker)
    assert len(index) == 0


texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=12)


@settings(max_examples=60)
@given(texts, st.sampled_from((8, 32, 48, 64, 100, 256)), st.data())
def test_behind_a_real_cache_it_says_what_the_cache_would_find(
    prompts: list[list[int]], page_tokens: int, data: st.DataObject
) -> None:
    """Prompts of runs of 60 equal tokens each, through a real scheduler whose pages are too few to keep them all."""
    scheduler = Scheduler(PagePool(1 + 640 // page_tokens, page_tokens), step_tokens=4096, max_running=4, max_waiting=4)
    journal, early, late = BlockJournal(), PrefixIndex(), PrefixIndex()
    scheduler.holdings.cache.on_change = lambda key, held: _note(journal, key, held)
    scheduler.holdings.cache.on_clear = journal.clear
    early.apply("w", journal.snapshot())
    joined = False
    named = {}
    for number, runs in enumerate(prompts):
        tokens = tuple(token for run in runs for token in (run,) * 60)
        work = Work(str(number), tokens, Sampling(), 0, 1.0)
        keys = named[tokens] = Active(work, page_tokens, b"salt").keys
        scheduler.add(Job(work.request_id, len(tokens), 1, prefill_only=True, keys=keys), 0.0)
        scheduler.advance(scheduler.schedule(0.0), 0.0)
        scheduler.release(work.request_id)
        if data.draw(st.booleans()):
            if data.draw(st.integers(0, 5)) == 0:
                scheduler.distrust()
            events = journal.take()
            for index in (early, late) if joined else (early,):
                assert events is None or index.apply("w", events)
        if not joined and data.draw(st.booleans()):
            joined = late.apply("w", journal.snapshot())  # between two pushes
    indexes = (early, late) if joined else (early,)
    last = journal.take()
    for index in indexes:
        assert last is None or index.apply("w", last)
        for tokens, keys in named.items():
            found = page_tokens * len(scheduler.holdings.cache.match(keys, len(keys)))
            held = index.match(block_names(tokens), 0.0)["w"]
            if BLOCK_TOKENS % page_tokens == 0:
                assert held == found // BLOCK_TOKENS * BLOCK_TOKENS
            else:  # a block may lie in a page that goes on differently, or be full where the page is not
                assert found - BLOCK_TOKENS < held < found + page_tokens + BLOCK_TOKENS


def _note(journal: BlockJournal, key: Key, held: bool) -> None:
    assert isinstance(key, PageName)
    journal.change(key.blocks, held=held)


@given(st.lists(st.integers(0, 300), max_size=400), st.lists(st.integers(1, 90), max_size=8))
def test_names_do_not_depend_on_how_the_tokens_come(tokens: list[int], cuts: list[int]) -> None:
    chain, names, start = BlockChain(), [], 0
    for cut in (*cuts, len(tokens)):
        names += chain.extend(tokens[start : start + cut])
        start += cut
    assert tuple(names) == block_names(tokens)
    assert len(names) == len(tokens) // BLOCK_TOKENS
    changed = [tokens[0] + 1, *tokens[1:]] if tokens else []
    assert not set(block_names(changed)) & set(names)
