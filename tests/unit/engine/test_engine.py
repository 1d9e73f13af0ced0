"""The engine end to end on a tiny model: batching, preemption, sampling, handoff, release, limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
import torch

from baton.errors import InvalidRequest, NotFound, Overloaded, ProtocolError
from baton.request import Sampling, TokenEvent
from engine.build import load_model
from engine.engine import BROKEN, REMEMBERED_TIMINGS, Chunk, Engine
from engine.model import Model

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.engine.conftest import Harness

GREEDY = Sampling(temperature=0.0, max_tokens=12)
SEEDED = Sampling(temperature=0.9, top_p=0.95, seed=7, max_tokens=12)


def test_batched_equals_alone(tiny: Model, harness: Harness) -> None:
    works = [harness.work(f"r{n}", harness.prompt(n, n)) for n in (1, 2, 3, 17, 33, 64, 100)]
    engine = harness.engine(tiny, pages=256)
    for work in works:
        engine.add(work)
    events = harness.run(engine)
    for work in works:
        assert harness.tokens(events[work.request_id]) == harness.alone(tiny, work, page_tokens=16, step_tokens=256)
    assert engine.load().pages_used == 0


def test_seeded_sampling_is_independent_of_the_batch(tiny: Model, harness: Harness) -> None:
    mine = harness.work("mine", harness.prompt(20), SEEDED)
    alone = harness.alone(tiny, mine)
    engine = harness.engine(tiny)
    engine.add(harness.work("greedy", harness.prompt(9, 1)))
    for seed in range(4):
        others = dataclasses.replace(SEEDED, seed=seed, top_k=seed, repetition_penalty=1.0 + seed / 10)
        engine.add(harness.work(f"other{seed}", harness.prompt(11 + seed, seed), others))
    engine.add(mine)
    assert harness.tokens(harness.run(engine)["mine"]) == alone
    another_seed = harness.work("mine", harness.prompt(20), dataclasses.replace(SEEDED, seed=8))
    assert harness.alone(tiny, another_seed) != alone


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, dataclasses.replace(SEEDED, frequency_penalty=0.8)])
def test_preemption_changes_no_token(tiny: Model, harness: Harness, sampling: Sampling) -> None:
    works = [harness.work(f"r{n}", harness.prompt(8, n), sampling) for n in range(4)]
    engine = harness.engine(tiny, pages=11)
    for work in works:
        engine.add(work)
    events = harness.run(engine)
    assert engine.preemptions > 0
    for work in works:
        assert harness.tokens(events[work.request_id]) == harness.alone(tiny, work)


PENALISED = dataclasses.replace(SEEDED, repetition_penalty=1.3, presence_penalty=0.4, min_tokens=9)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PENALISED])
@pytest.mark.parametrize("sent", [1, 5, 11])
def test_a_sequence_goes_on_from_what_another_engine_sent(
    tiny: Model, harness: Harness, sampling: Sampling, sent: int
) -> None:
    """With its sampler as it was: penalties, seed and counts go by prompt and output, not by who computed them."""
    work = harness.work("a", harness.prompt(30), sampling)
    whole = harness.alone(tiny, work)
    engine = harness.engine(tiny)
    engine.add(harness.work("neighbour", harness.prompt(9, 1)))
    engine.add(dataclasses.replace(work, output=tuple(whole[:sent])))
    events = harness.run(engine)["a"]
    assert [event.index for event in events] == list(range(sent, 12))
    assert whole[:sent] + harness.tokens(events) == whole
    assert events[-1].finish == "length"
    assert engine.load().pages_used == 0


def test_an_answer_that_is_complete_cannot_go_on(tiny: Model, harness: Harness) -> None:
    work = dataclasses.replace(harness.work("a", harness.prompt(30), GREEDY), output=tuple(range(12)))
    with pytest.raises(InvalidRequest, match="output: 12 tokens"):
        harness.engine(tiny).add(work)


class Recorder:
    """Copies each layer's KV out of the pages the moment it is announced, as a prefill worker does."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.calls: list[tuple[int, Chunk]] = []
        self.kv: list[tuple[int, int, object, object]] = []

    def layer_written(self, layer: int, chunks: Sequence[Chunk]) -> None:
        assert self.engine is not None
        for chunk in chunks:
            self.calls.append((layer, chunk))
            self.kv.append(
                (layer, chunk.start, *self.engine.cache.gather(layer, chunk.pages, chunk.start, chunk.count))
            )


@pytest.mark.parametrize("sampling", [GREEDY, dataclasses.replace(SEEDED, presence_penalty=0.5, min_tokens=3)])
def test_handed_over_sequence_continues_as_if_it_had_stayed(tiny: Model, harness: Harness, sampling: Sampling) -> None:
    work = harness.work("a", harness.prompt(45), sampling)
    local = harness.alone(tiny, work)
    recorder = Recorder()
    prefill = harness.engine(tiny, page_tokens=4, step_tokens=16, observer=recorder)
    decode = harness.engine(tiny, page_tokens=7, step_tokens=64)
    recorder.engine = prefill
    prefill.add(harness.work("bystander", harness.prompt(9, 5)))
    prefill.add(work, prefill_only=True)
    [first] = harness.run(prefill)["a"]
    assert prefill.load().pages_used == 12  # still held
    pages = decode.reserve(work)
    for layer, start, keys, values in recorder.kv:
        decode.cache.scatter(layer, pages, start, keys, values)  # type: ignore[arg-type]
    decode.start("a", first)
    decode.add(harness.work("neighbour", harness.prompt(30, 6)))
    rest = harness.run(decode)["a"]
    assert rest[0].index == 1
    assert [first.token, *harness.tokens(rest)] == local
    assert rest[-1].finish == "length"
    assert {chunk.request_id for _, chunk in recorder.calls} == {"a"}
    assert [layer for layer, chunk in recorder.calls if chunk.start == 0] == [0, 1, 2]
    assert sum(chunk.count for layer, chunk in recorder.calls if layer == 0) == 45
    assert prefill.release("a")
    assert prefill.load().pages_used == decode.load().pages_used == 0


def test_a_prompt_that_begins_like_an_earlier_one_computes_the_rest_only(tiny: Model, harness: Harness) -> None:
    begin, mine, other = harness.prompt(40), harness.prompt(9, 1), harness.prompt(9, 2)
    engine = harness.engine(tiny, pages=64)
    engine.add(harness.work("warm", begin + other))
    harness.run(engine)
    assert (engine.load().pages_used, engine.load().hit_tokens) == (0, 0)
    engine.add(harness.work("a", begin + mine))
    assert harness.tokens(harness.run(engine)["a"]) == harness.alone(tiny, harness.work("a", begin + mine))
    assert (engine.load().hit_tokens, engine.load().entered_tokens) == (40, 98)
    cold = harness.engine(tiny, prefix_cache=False)
    for name in "ab":
        cold.add(harness.work(name, begin))
    harness.run(cold)
    assert (cold.load().hit_tokens, cold.load().pages_cached) == (0, 0)


def test_an_answer_is_part_of_the_next_turns_prefix(tiny: Model, harness: Harness) -> None:
    engine, prompt = harness.engine(tiny), harness.prompt(21)
    engine.add(harness.work("turn 1", prompt))
    answer = harness.tokens(harness.run(engine)["turn 1"])
    talk = [*prompt, *answer, *harness.prompt(6, 3)]
    engine.add(harness.work("turn 2", talk))
    assert harness.tokens(harness.run(engine)["turn 2"]) == harness.alone(tiny, harness.work("turn 2", talk))
    assert engine.load().hit_tokens == 32  # of 33 tokens, the newest of which was never computed


def test_wholly_cached_prompts_share_pages_and_change_none(tiny: Model, harness: Harness) -> None:
    work = harness.work("a", harness.prompt(16))
    local = harness.alone(tiny, work)
    engine = harness.engine(tiny)
    engine.add(work)
    harness.run(engine)
    for name in "bcd":
        engine.add(dataclasses.replace(work, request_id=name))
    events = harness.run(engine)
    assert [harness.tokens(events[name]) for name in "bcd"] == [local] * 3
    assert engine.load().hit_tokens == 3 * 15


@pytest.mark.parametrize("length", [16, 19])
def test_a_handoff_sends_the_cached_tokens_too(tiny: Model, harness: Harness, length: int) -> None:
    work = harness.work("a", harness.prompt(length))
    recorder = Recorder()
    prefill, decode = harness.engine(tiny, step_tokens=8, observer=recorder), harness.engine(tiny, page_tokens=7)
    recorder.engine = prefill
    prefill.add(harness.work("warm", harness.prompt(length)))
    harness.run(prefill)
    prefill.add(work, prefill_only=True)
    [first] = harness.run(prefill)["a"]
    assert prefill.load().hit_tokens == min(16, length - 1)
    assert [(chunk.start, chunk.count) for layer, chunk in recorder.calls if layer == 2] == [(0, length)]
    pages = decode.reserve(work)
    for layer, start, keys, values in recorder.kv:
        decode.cache.scatter(layer, pages, start, keys, values)  # type: ignore[arg-type]
    decode.start("a", first)
    assert [first.token, *harness.tokens(harness.run(decode)["a"])] == harness.alone(tiny, work)


@pytest.mark.parametrize(("exact", "hits"), [(True, 16), (False, 0)])
def test_kv_that_a_codec_changed_serves_no_other_sequence(
    tiny: Model, harness: Harness, exact: bool, hits: int
) -> None:
    engine, work = harness.engine(tiny), harness.work("a", harness.prompt(17))
    engine.reserve(work)
    engine.start("a", TokenEvent("a", 0, 5), exact=exact)
    harness.run(engine)
    engine.add(dataclasses.replace(work, request_id="b"))
    events = harness.run(engine)["b"]
    assert engine.load().hit_tokens == hits
    assert exact or harness.tokens(events) == harness.alone(tiny, work)


def test_started_sequence_survives_preemption(tiny: Model, harness: Harness) -> None:
    work = harness.work("a", harness.prompt(10), SEEDED)
    local = harness.alone(tiny, work)
    prefill, decode = harness.engine(tiny), harness.engine(tiny, pages=8)
    prefill.add(work, prefill_only=True)
    [first] = harness.run(prefill)["a"]
    held = [prefill.cache.gather(layer, range(3), 0, 10) for layer in range(3)]
    decode.add(harness.work("urgent", harness.prompt(8, 1), priority=9))
    decode.step()
    pages = decode.reserve(work)
    for layer, (keys, values) in enumerate(held):
        decode.cache.scatter(layer, pages, 0, keys, values)
    decode.start("a", first)
    assert [first.token, *harness.tokens(harness.run(decode)["a"])] == local
    assert decode.preemptions > 0


def test_first_token_that_finishes_only_releases(tiny: Model, harness: Harness) -> None:
    engine = harness.engine(tiny)
    engine.reserve(harness.work("a", harness.prompt(10)))
    engine.start("a", TokenEvent("a", 0, 5, finish="stop"))
    assert (engine.has_work, engine.load().pages_used) == (False, 0)
    with pytest.raises(NotFound):
        engine.start("a", TokenEvent("a", 0, 5))


def test_end_tokens_stop_and_are_emitted(tiny: Model, harness: Harness) -> None:
    plain = harness.alone(tiny, harness.work("a", harness.prompt(20)))
    index = next(i for i, token in enumerate(plain) if i >= 2 and token not in plain[:i])
    ends = (plain[index],)
    for sampling in (dataclasses.replace(GREEDY, eos_token_ids=ends), dataclasses.replace(GREEDY, stop_token_ids=ends)):
        engine = harness.engine(tiny)
        engine.add(harness.work("a", harness.prompt(20), sampling))
        events = harness.run(engine)["a"]
        assert harness.tokens(events) == plain[: index + 1]
        assert events[-1].finish == "stop"
        later = dataclasses.replace(sampling, min_tokens=index + 1)
        forced = harness.alone(tiny, harness.work("a", harness.prompt(20), later))
        assert forced[:index] == plain[:index]
        assert plain[index] not in forced[: index + 1]


def test_logprobs_ride_on_the_events(tiny: Model, harness: Harness) -> None:
    engine = harness.engine(tiny)
    sampling = dataclasses.replace(GREEDY, logprobs=True, top_logprobs=3, max_tokens=4)
    engine.add(harness.work("a", harness.prompt(5), sampling))
    engine.add(harness.work("b", harness.prompt(5, 1)))
    events = harness.run(engine)
    assert all(event.logprob is None and event.top == () for event in events["b"])
    for event in events["a"]:
        assert len(event.top) == 3
        assert event.top[0].token == event.token
        assert event.top[0].logprob == event.logprob
        assert 0.0 >= event.top[0].logprob >= event.top[1].logprob >= event.top[2].logprob


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_release_in_any_state_frees_everything(tiny: Model, harness: Harness, steps: int) -> None:
    engine = harness.engine(tiny, step_tokens=8)
    engine.add(harness.work("local", harness.prompt(20)))
    engine.add(harness.work("handed", harness.prompt(20, 1)), prefill_only=True)
    engine.reserve(harness.work("reserved", harness.prompt(20, 2)))
    for _ in range(steps):
        engine.step()
    for name in ("local", "handed", "reserved"):
        assert engine.release(name)
        assert not engine.release(name)
        engine.check_integrity()
    load = engine.load()
    assert (load.pages_used, load.running, load.waiting, load.waiting_tokens) == (0, 0, 0, 0)
    assert not engine.has_work


def test_a_step_without_free_pages_says_so(tiny: Model, harness: Harness) -> None:
    engine = harness.engine(tiny, pages=5)
    engine.reserve(harness.work("landing", harness.prompt(9)))
    engine.add(harness.work("waiting", harness.prompt(9, 1), dataclasses.replace(GREEDY, max_tokens=2)))
    assert engine.step() == []
    assert engine.blocked
    engine.release("landing")
    assert harness.run(engine)["waiting"][-1].finish == "length"
    assert not engine.blocked


def test_what_can_never_run_is_refused(tiny: Model, harness: Harness) -> None:
    engine = harness.engine(tiny, pages=8, max_waiting=1)
    refused = [
        (harness.prompt(22), GREEDY, "can never fit"),
        (harness.prompt(250), GREEDY, "exceed the context of 256"),
        ([320], GREEDY, "token ids"),
        ([-1], GREEDY, "token ids"),
        ([], GREEDY, "at least one prompt token"),
    ]
    for prompt, sampling, message in refused:
        with pytest.raises(InvalidRequest, match=message):
            engine.add(harness.work("bad", prompt, sampling))
        with pytest.raises(InvalidRequest, match=message):
            engine.reserve(harness.work("bad", prompt, sampling))
    engine.add(harness.work("good", harness.prompt(5)))
    with pytest.raises(InvalidRequest, match="already here"):
        engine.add(harness.work("good", harness.prompt(5)))
    with pytest.raises(Overloaded):
        engine.add(harness.work("one too many", harness.prompt(5)))
    assert len(harness.run(engine)["good"]) == 12


def test_timing_is_kept_for_a_while_after_release(tiny: Model, harness: Harness) -> None:
    engine = harness.engine(tiny)
    engine.add(harness.work("a", harness.prompt(5)))
    assert engine.timing("a").scheduled_s is None
    harness.run(engine)
    timing = engine.timing("a")
    assert timing.scheduled_s is not None
    assert timing.first_token_s is not None
    assert timing.added_s <= timing.scheduled_s <= timing.first_token_s
    for index in range(REMEMBERED_TIMINGS):
        engine.add(harness.work(f"b{index}", harness.prompt(1)))
        engine.release(f"b{index}")
    with pytest.raises(NotFound):
        engine.timing("a")


def test_logits_that_are_not_finite_end_their_sequence_and_no_other(tiny_folder: Path, harness: Harness) -> None:
    model = load_model(tiny_folder, "float32", 1)
    model.embedding[7] = torch.nan
    engine = harness.engine(model, prefix_cache=False)
    for name, prompt in (("good", [5, 6, 9]), ("bad", [5, 7, 9]), ("drawn", [7])):
        warm = Sampling(temperature=0.8, seed=1, max_tokens=4, logprobs=True, eos_token_ids=())
        engine.add(harness.work(name, prompt, warm))
    events = harness.run(engine)
    assert [len(events[name]) for name in ("good", "bad", "drawn")] == [4, 1, 1]
    assert (events["bad"][0].finish, events["drawn"][0].finish) == (BROKEN, BROKEN)
    assert engine.load().pages_used == 0


def test_broken_kv_does_not_stay_in_the_prefix_cache(tiny: Model, harness: Harness) -> None:
    engine = harness.engine(tiny)
    prompt, other = harness.prompt(20), harness.prompt(9, 3)
    engine.add(harness.work("before", prompt))
    expected = harness.tokens(harness.run(engine)["before"])
    assert engine.load().pages_cached > 0
    for layer in engine.cache.layers:
        layer.fill_(torch.nan)
    for name, tokens in (("broken", prompt), ("other", other)):
        engine.add(harness.work(name, tokens))
    events = harness.run(engine)
    assert [event.finish for event in events["broken"]] == [BROKEN]
    assert harness.tokens(events["other"]) == harness.alone(tiny, harness.work("other", other))
    assert engine.load().pages_cached == 0
    engine.add(harness.work("after", prompt))
    assert harness.tokens(harness.run(engine)["after"]) == expected


def test_a_first_token_outside_the_vocabulary_is_refused(tiny: Model, harness: Harness) -> None:
    engine = harness.engine(tiny)
    engine.reserve(harness.work("a", [5, 6]))
    for token in (-1, tiny.spec.vocab_size):
        with pytest.raises(ProtocolError, match="first token"):
            engine.start("a", TokenEvent("a", 0, token))
    engine.release("a")


def test_an_end_token_that_the_model_has_not_changes_nothing(tiny: Model, harness: Harness) -> None:
    engine = harness.engine(tiny)
    for name, ends in (("a", (-1, 99_999)), ("b", ())):
        engine.add(
            harness.work(name, [5, 6], Sampling(temperature=0.0, max_tokens=4, min_tokens=2, eos_token_ids=ends))
        )
    events = harness.run(engine)
    assert [event.token for event in events["a"]] == [event.token for event in events["b"]]
