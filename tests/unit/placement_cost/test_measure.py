"""The measuring itself, on the real engine with a model so small that its times mean nothing."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from baton.config import PoolConfig
from baton.errors import ConfigError
from engine import weights
from engine.model import Model
from engine.spec import ModelSpec
from placement.measure import DECODE_STEPS, measure_steps, scenarios
from placement.measure_handoff import measure_codecs, measure_wire
from placement.step_fit import StepFit

POOL = PoolConfig(kv_tokens=2048, max_running=12)
MAX_CONTEXT = 256


@pytest.fixture(scope="module")
def tiny() -> Model:
    spec = ModelSpec(
        vocab_size=1024, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2, head_dim=8, norm_eps=1e-6,
        rope_theta=1e4, rope_scaling=None, tied_head=True, max_context=512, bos_token_id=None, eos_token_ids=(),
    )  # fmt: skip
    model = Model(spec, name="tiny", dtype="float32", device=torch.device("cpu"))
    torch.manual_seed(0)
    for place in weights.places(model).values():
        assert place.target is not None
        place.target.normal_(0, 0.05)
    model.pack()
    return model


def test_every_scenario_fits_the_engine() -> None:
    for kv_tokens, max_running in ((32768, 64), (2048, 12), (4096, 64)):
        grid = scenarios(max_context=MAX_CONTEXT, kv_tokens=kv_tokens, page_tokens=16, max_running=max_running)
        assert len(grid) > 20
        for s in grid:
            assert max((*s.prompts, *s.contexts)) + DECODE_STEPS + 2 <= MAX_CONTEXT
            pages = sum(-(-(tokens + DECODE_STEPS + 2) // 16) for tokens in (*s.prompts, *s.contexts))
            assert 16 * pages <= kv_tokens
            assert len(s.prompts) + len(s.contexts) <= max_running


def test_shapes_measured_are_those_asked_for(tiny: Model) -> None:
    told: list[float] = []
    steps = measure_steps(tiny, POOL, MAX_CONTEXT, lambda _, part: told.append(part), rounds=2)
    assert steps.complete
    assert told == sorted(told)
    assert steps.cpu_share > 0
    shapes = {o.step for o in steps.observations}
    assert len(shapes) == len(steps.observations)
    chunks = {chunk for step in shapes for chunk in step.chunks}
    # Prompts of 64 tokens under a budget of 16, and of 250 under one of 128.
    assert {(0, 16), (16, 16), (32, 16), (48, 16), (0, 128), (128, 122)} <= chunks
    decodes = Counter(len(step.contexts) for step in shapes if not step.chunks)
    assert {1, 2, 4, 8, 12} <= set(decodes)
    assert any(step.chunks and step.contexts for step in shapes)
    # Decodes of 160 tokens, of which the third step has two more.
    assert (162,) * 4 in {step.contexts for step in shapes}
    assert all(o.seconds > 0 and o.repeats >= 2 for o in steps.observations)
    assert StepFit.of(steps.observations).base_s >= 0


def test_interrupt_keeps_what_was_measured(tiny: Model) -> None:
    def stop(_: str, part: float) -> None:
        if part > 0.3:
            raise KeyboardInterrupt

    steps = measure_steps(tiny, POOL, MAX_CONTEXT, stop, rounds=1, clock="cpu")
    assert not steps.complete
    assert steps.observations


def test_codecs_run_on_real_pages(tiny: Model) -> None:
    speeds = measure_codecs(tiny, lambda text: [ord(c) % 1024 for c in text], ("raw", "lossless", "int8"), MAX_CONTEXT)
    assert speeds["raw"].ratio == 1.0
    assert speeds["lossless"].ratio > 1.0
    assert speeds["int8"].ratio == 8 * 4 / (8 + 2)  # a float32 head of 8: 8 bytes and one scale
    for speed in speeds.values():
        for stage in (speed.encode, speed.decode):
            assert stage.bytes_per_s > 0
            assert stage.layer_s >= 0


def test_wire_between_two_processes() -> None:
    speed = measure_wire("tcp")
    assert 1e7 < speed.bytes_per_s < 1e11
    assert 0 <= speed.layer_s < 1


def test_a_transport_that_cannot_work_is_named() -> None:
    with pytest.raises(ConfigError, match="failed to start"):
        measure_wire("smoke-signals")
