"""The comparison itself: what it takes for disturbed, together, and right."""

from __future__ import annotations

import copy
import shlex
from typing import Any

import pytest

from baton.config import Config
from baton.errors import ConfigError
from bench import goodput, plan_reality
from placement.cost import StepShape
from placement.profile import CodecSpeed, Machine, Profile, Speed
from placement.step_fit import Observation

COMMAND = (
    "python -m bench.goodput --sweep 1,9 --requests 30 --warmup 2 --prompt uniform:50:150 --output 8 "
    "--ttft-ms 400 --tpot-ms 60"
)


@pytest.fixture
def profile() -> Profile:
    shapes = [StepShape(((0, n),), ()) for n in range(10, 410, 10)] + [StepShape((), (c,) * 4) for c in (50, 500)]
    steps = tuple(Observation(one, 0.02 + 1e-3 * sum(n for _, n in one.chunks), 0.1, 3) for one in shapes)
    codecs, wires = {"raw": CodecSpeed(Speed(1e-4, 2e9), Speed(2e-4, 4e9), 1.0)}, {"tcp": Speed(5e-5, 1e9)}
    machine = Machine("CPU", "", 2, "Linux", "2.13")
    return Profile(
        machine, "2026-01-01", "m", "f", "float32", 1, 30, 46080, 16, True, "wall", 1.0, steps, codecs, wires,
        pulse_s=0.003,
    )  # fmt: skip


@pytest.fixture
def document(profile: Profile) -> dict[str, Any]:
    """What bench.goodput would write of a service that does exactly as predicted."""
    chosen = goodput.options(shlex.split(COMMAND)[3:])
    found: dict[str, Any] = {
        "command": COMMAND, "options": goodput._plain(chosen), "runs": [],
        "server": {"pools": {"prefill": 1, "decode": 1}, "codec": "raw", "transport": "tcp"},
        "at_rest": {"busy": 0.2, "others": 0.0}, "errands": {"request_s": 0.05, "token_s": 0.001, "first_s": 0.01},
    }  # fmt: skip
    for rate in chosen.sweep:
        run: dict[str, Any] = {
            "rate_per_s": rate, "pulse_s": 0.003,
            "cores": {"busy": 1.0, "stolen": 0.05, "engines": 0.7, "others": 0.02},
        }  # fmt: skip
        seen = plan_reality._predicted(profile, (found, run), Config())
        run["records"] = [
            {
                "due_s": 1.0, "status": "OK", "output_tokens": 8, "met": one.met,
                "token_times_s": [1.0 + one.ttft + index * one.tpot for index in range(8)],
            }
            for one in seen
        ]  # fmt: skip
        found["runs"].append(run)
    return found


def test_a_service_that_does_as_predicted_has_no_error(profile: Profile, document: dict[str, Any]) -> None:
    slow, fast, goodput_row = plan_reality.compare(profile, [document], Config())
    for row in (slow, fast):
        assert row["requests"] == 30
        for name in plan_reality.FIGURES:
            assert row[name]["error"] == pytest.approx(0.0, abs=1e-9)
        assert row["attainment"]["measured"] == row["attainment"]["predicted"]
    assert slow["attainment"]["measured"] > 0.9 > fast["attainment"]["measured"]
    assert goodput_row["goodput"]["error"] == pytest.approx(0.0)
    assert len(list(plan_reality.lines([slow, fast, goodput_row]))) == 3


def test_repeats_are_taken_together_and_a_slower_machine_is_allowed_for(
    profile: Profile, document: dict[str, Any]
) -> None:
    again = copy.deepcopy(document)
    for run in again["runs"]:
        run["pulse_s"] = 0.006
    again["errands"]["first_s"] = 0.011
    slow, *_ = plan_reality.compare(profile, [document, again], Config())
    assert slow["requests"] == 60
    assert slow["pulse"] == pytest.approx([1.0, 2.0])
    assert slow["ttft_p50"]["error"] > 0.1 > abs(slow["ttft_p50"]["as_profiled"])


def test_attainment_that_rises_by_chance_is_taken_together() -> None:
    curve = [(0.4, 1.0, 64), (0.5, 0.84, 64), (0.6, 1.0, 32), (0.7, 0.7, 64), (0.8, 0.8, 64)]
    both, rest = (0.84 * 64 + 32) / 96, 0.75
    assert plan_reality.falling(curve) == [(0.4, 1.0), (0.5, both), (0.6, both), (0.7, rest), (0.8, rest)]
    assert plan_reality.crossing(plan_reality.falling(curve)) == pytest.approx(0.4 + 0.1 * 0.1 / (1.0 - both))
    assert plan_reality.falling([(1.0, 0.9, 1), (2.0, 0.5, 1)]) == [(1.0, 0.9), (2.0, 0.5)]


def test_the_course_of_a_run_is_told_in_its_own_pulse(profile: Profile, document: dict[str, Any]) -> None:
    run = document["runs"][0]
    run["course"] = [[-0.2, 0.003], [4.0, 0.006]]
    assert plan_reality._course(run) == ((0.0, 1.0), (4.0, 2.0))
    slow, *_ = plan_reality.compare(profile, [document], Config())
    assert slow["ttft_p50"]["error"] > 0.1 > abs(slow["ttft_p50"]["as_profiled"])


def test_a_disturbed_run_is_named_and_not_compared(profile: Profile, document: dict[str, Any]) -> None:
    document["runs"][0]["cores"]["others"] = 0.3
    disturbed, fast, goodput_row = plan_reality.compare(profile, [document], Config())
    assert disturbed["rate"] == 1.0
    assert disturbed["disturbed"] == "others took 0.30 cores, above 0.1"
    assert "ttft_p50" in fast
    assert goodput_row["goodput"]["error"] is None
    assert "disturbed" in next(iter(plan_reality.lines([disturbed])))


def test_a_run_that_does_not_say_who_used_the_machine_is_refused(profile: Profile, document: dict[str, Any]) -> None:
    document["runs"][1]["cores"]["others"] = None
    with pytest.raises(ConfigError, match="does not say who used the machine"):
        list(plan_reality.compare(profile, [document], Config()))
