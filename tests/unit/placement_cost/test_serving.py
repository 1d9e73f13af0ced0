"""What workers add to steps, and at which speed the machine was: measured here on real processes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from baton.config import Config
from engine.build import load_model
from placement import measure_served
from placement.measure_served import Served, serving
from placement.profile import Serving
from placement.pulse import STRIDE_S, Pulse, course


def test_serving_is_what_most_requests_took_longer() -> None:
    found = serving([*[Served(0.03, 0.001)] * 2, Served(9.0, 0.001), *[Served(0.028, 0.002)] * 2])
    assert found == Serving(chunk_s=0.03, step_s=0.001)


def test_what_was_faster_in_a_worker_is_noise() -> None:
    assert serving([Served(-0.2, -0.001)] * 3) == Serving()


def test_a_course_follows_the_machine_and_no_single_beat() -> None:
    beats = [(100.0 + 0.25 * n, 0.003 if n < 80 else 0.004) for n in range(160)]  # slower from 120 s on
    beats[20] = (beats[20][0], 0.3)
    found = course(beats)
    assert [at_s for at_s, _ in found] == pytest.approx([100.0 + STRIDE_S * n for n in range(20)])
    assert {seconds for at_s, seconds in found if at_s < 116.0} == {0.003}
    assert {seconds for at_s, seconds in found if at_s > 122.0} == {0.004}
    assert course([]) == []
    assert course(beats[:1]) == beats[:1]


def test_a_pulse_beats_until_it_is_closed() -> None:
    with Pulse() as pulse:
        first_s = pulse.read()
        time.sleep(0.6)
        assert 1e-5 < pulse.read() < 100 * first_s
        process = pulse.process
        assert process.is_alive()
    assert not process.is_alive()


@pytest.mark.slow
def test_real_workers_serve_what_is_compared(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_served, "TURNS", 1)
    settings = Config.model_validate(
        {"model": {"dtype": "float32", "max_context": 256}, "handoff": {"transport": "tcp"}}
    )
    added = measure_served.measure_served(load_model(model_folder, "float32", 1), model_folder, settings)
    assert 0 <= added.chunk_s < 5
    assert 0 <= added.step_s < 5
