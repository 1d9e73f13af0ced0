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
from placement.pulse import Pulse


def test_a_line_goes_through_what_two_lengths_took_longer() -> None:
    found = serving({20: [Served(0.03, 0.001)] * 3, 120: [Served(0.05, 0.002)] * 2 + [Served(9.0, 0.001)]})
    assert found.chunk_s == pytest.approx(0.026)
    assert found.token_s == pytest.approx(0.0002)
    assert found.step_s == 0.001


def test_what_was_faster_in_a_worker_is_noise() -> None:
    falling = serving({20: [Served(0.03, -0.001)], 120: [Served(0.01, -0.002)]})
    assert falling == Serving(chunk_s=0.02, token_s=0.0, step_s=0.0)
    assert serving({20: [Served(-0.2, 0.0)], 120: [Served(-0.1, 0.0)]}).chunk_s == 0.0


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
    assert 0 <= added.chunk_s + 32 * added.token_s < 5
    assert 0 <= added.step_s < 5
