from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import ConfigError
from placement.cost import StepShape, step_s
from placement.host import SharedMachine
from placement.profile import CodecSpeed, Machine, Profile, ProfiledReplica, Serving, Speed, handoffs_of
from placement.step_fit import Observation, StepFit, held_out, non_negative

MACHINE = Machine("CPU", "", 2, "Linux", "2.13")


def _true_s(step: StepShape) -> float:
    """A machine that obeys the formula: weights bound below 32 rows, arithmetic above."""
    rows = len(step.contexts) + sum(count for _, count in step.chunks)
    seconds = 0.02 + 1e-4 * min(rows, 32) + 1e-3 * max(0, rows - 32)
    seconds += 5e-4 * len(step.contexts) + 2e-6 * sum(step.contexts)
    return seconds + sum(1e-7 * n * n / 2 + 3e-7 * a * n + (1e-6 * (a + n) if a else 0) for a, n in step.chunks)


def _shapes() -> list[StepShape]:
    steps = [StepShape(((a, n),), ()) for n in (1, 4, 16, 32, 64, 128, 256, 512) for a in (0, n, 700, 1500)]
    steps += [StepShape((), (c,) * b) for b in (1, 2, 4, 8, 16, 32, 64) for c in (20, 200, 900, 2000)]
    return steps + [StepShape(((0, n),), (c,) * b) for n in (50, 300) for b in (4, 16, 40) for c in (100, 800)]


def _profile(noise: float = 0.0) -> Profile:
    wobble = np.exp(noise * np.random.default_rng(0).standard_normal(200)).tolist()
    steps = tuple(Observation(s, _true_s(s) * w, 0.1, 3) for s, w in zip(_shapes(), wobble, strict=False))
    codecs = {"raw": CodecSpeed(Speed(1e-4, 2e9), Speed(2e-4, 4e9), 1.0)}
    wires = {"tcp": Speed(5e-5, 1e9)}
    return Profile(
        MACHINE, "2026-01-01", "m", "f", "float32", 2, 30, 46080, 16, True, "wall", 1.0, steps, codecs, wires
    )


REPLICA = ProfiledReplica(_profile(0.05), codec="raw", transport="tcp", kv_tokens=32768)
CHUNKS = st.lists(st.tuples(st.integers(0, 1500), st.integers(1, 500)), max_size=4)
CONTEXTS = st.lists(st.integers(1, 2000), max_size=64)


def test_fit_finds_the_machine() -> None:
    steps = _profile().steps
    fit = StepFit.of(steps)
    assert held_out(steps).p95 < 0.02
    assert fit.context_s == pytest.approx(2e-6, rel=0.1)
    assert fit.before_s == pytest.approx(3e-7, rel=0.1)


def test_held_out_error_is_about_the_noise() -> None:
    error = held_out(_profile(0.05).steps)
    assert 0.02 < error.median < 0.08


@settings(deadline=None)
@given(CHUNKS, CONTEXTS)
def test_replica_is_the_fit(chunks: list[tuple[int, int]], contexts: list[int]) -> None:
    step = StepShape(tuple(chunks), tuple(contexts))
    assert step_s(REPLICA, step) == pytest.approx(REPLICA.fit.seconds(step) if chunks or contexts else 0.0, rel=1e-9)
    assert REPLICA.decode_step_s(len(contexts), sum(contexts)) == step_s(REPLICA, StepShape((), step.contexts))


@settings(deadline=None)
@given(CHUNKS, CONTEXTS, st.integers(0, 1500), st.integers(1, 500))
def test_more_work_never_takes_less(chunks: list[tuple[int, int]], contexts: list[int], start: int, count: int) -> None:
    seconds = step_s(REPLICA, StepShape(tuple(chunks), tuple(contexts))) * (1 - 1e-9)
    assert step_s(REPLICA, StepShape((*chunks, (start, count)), tuple(contexts))) >= seconds
    assert step_s(REPLICA, StepShape(tuple(chunks), (*contexts, count))) >= seconds
    assert step_s(REPLICA, StepShape(tuple(chunks), tuple(c + 100 for c in contexts))) >= seconds


def test_file_round_trip(tmp_path: Path) -> None:
    measured, file = _profile(0.1), tmp_path / "profile.json"
    measured.save(file)
    assert Profile.load(file) == measured
    assert len(file.read_text().splitlines()) > len(measured.steps)


def test_file_without_what_serving_adds_is_of_an_older_day(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    replace(_profile(), serving=Serving(0.03, 1e-3), pulse_s=0.003).save(file)
    assert Profile.load(file).serving == Serving(0.03, 1e-3)
    tree = json.loads(file.read_text())
    del tree["serving"], tree["pulse_s"]
    file.write_text(json.dumps(tree))
    assert Profile.load(file) == _profile()


def test_a_slower_machine_takes_longer_for_everything() -> None:
    day = replace(_profile(), serving=Serving(0.03, 1e-3), pulse_s=0.003)
    step, replicas = StepShape(((0, 100),), (50, 60)), []
    for profile in (day, day.at(0.0036)):
        replicas.append(ProfiledReplica(profile, codec="raw", transport="tcp", kv_tokens=1, sends=True))
    assert step_s(replicas[1], step) == pytest.approx(1.2 * step_s(replicas[0], step))
    assert replicas[1].transfer_s(100) == pytest.approx(1.2 * replicas[0].transfer_s(100))
    assert day.at(0.0036).at(0.003).longer == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="pulse_s"):
        _profile().at(0.003)


def test_serving_adds_to_the_steps_of_either_kind_of_worker() -> None:
    profile = replace(_profile(), serving=Serving(0.03, 1e-3))
    decode, prefill = (
        ProfiledReplica(profile, codec="raw", transport="tcp", kv_tokens=1, sends=sends) for sends in (False, True)
    )
    step, plain = (
        StepShape(((0, 100), (20, 50)), ()),
        ProfiledReplica(_profile(), codec="raw", transport="tcp", kv_tokens=1),
    )
    assert step_s(prefill, step) - step_s(plain, step) == pytest.approx(2 * 0.03)
    assert step_s(decode, step) - step_s(plain, step) == pytest.approx(1e-3)
    assert decode.decode_step_s(3, 300) - plain.decode_step_s(3, 300) == pytest.approx(1e-3)


def test_handoff_takes_its_speeds_from_the_profile() -> None:
    raw = 100 * 46080
    assert REPLICA.transfer_s(100) == pytest.approx(30 * 3.5e-4 + raw / 2e9 + raw / 4e9 + raw / 1e9)
    assert 0 < REPLICA.exposed_transfer_s(100) < REPLICA.transfer_s(100)
    assert REPLICA.kv_tokens() == 32768


def test_extrapolation_is_counted() -> None:
    replica = ProfiledReplica(_profile(), codec="raw", transport="tcp", kv_tokens=1)
    step_s(replica, StepShape(((0, 400),), (2000,) * 20))
    assert not replica.extrapolations
    assert step_s(replica, StepShape(((0, 4000),), ())) > step_s(replica, StepShape(((0, 512),), ()))
    assert replica.extrapolations == {"longer contexts than measured": 1, "more rows in a step than measured": 1}


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_non_negative_least_squares_meets_its_conditions(seed: int, columns: int) -> None:
    """Karush-Kuhn-Tucker: no slope for what is used, none downhill for what is at zero."""
    rng = np.random.default_rng(seed)
    features, target = rng.normal(size=(30, columns)), rng.normal(size=30)
    x = non_negative(features, target)
    slope = features.T @ (features @ x - target)
    assert (x >= 0).all()
    assert (slope > -1e-5).all()
    assert np.abs(slope[x > 0]).max(initial=0) < 1e-5


@pytest.mark.parametrize(
    ("damage", "message"),
    [({"form": 9}, "not a profile of form"), ({"steps": [[1, 2]]}, "damaged"), ({"machine": {}}, "damaged")],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, damage: dict[str, object], message: str) -> None:
    file = tmp_path / "profile.json"
    _profile().save(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    with pytest.raises(ConfigError, match=message):
        Profile.load(file)


def test_auto_is_the_exact_codec_that_workers_would_choose() -> None:
    codecs = {
        "raw": CodecSpeed(Speed(0, 2e9), Speed(0, 4e9), 1.0),
        "lossless": CodecSpeed(Speed(0, 1e9), Speed(0, 2e9), 1.5),
        "int8": CodecSpeed(Speed(0, 2e9), Speed(0, 4e9), 4.0),
    }
    wires = {"tcp": Speed(1e-5, 1e8), "nixl": Speed(1e-5, 1e10)}
    profile = replace(_profile(), codecs=codecs, wires=wires)
    assert handoffs_of(profile, "auto", "tcp").keys() == {"raw", "lossless"}
    for transport, chosen in (("tcp", "lossless"), ("nixl", "raw")):
        auto, fixed = (
            ProfiledReplica(profile, codec=codec, transport=transport, kv_tokens=1) for codec in ("auto", chosen)
        )
        assert auto.transfer_s(1000) == fixed.transfer_s(1000)
        assert auto.exposed_transfer_s(1000) == fixed.exposed_transfer_s(1000)


def test_what_was_not_measured_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'int8' was not measured; raw were"):
        ProfiledReplica(_profile(), codec="int8", transport="tcp", kv_tokens=1)
    with pytest.raises(ConfigError, match=r"'nixl' was not measured; tcp were"):
        ProfiledReplica(_profile(), codec="raw", transport="nixl", kv_tokens=1)
    with pytest.raises(ConfigError, match=r"'lossless' was not measured; int8 were"):
        handoffs_of(replace(_profile(), codecs={"int8": CodecSpeed(Speed(0, 1e9), Speed(0, 1e9), 2.0)}), "auto", "tcp")
    few = Profile(MACHINE, "", "", "", "float32", 1, 1, 1, 1, False, "wall", 1.0, (), {}, {})
    with pytest.raises(ConfigError, match="a fit needs 40"):
        ProfiledReplica(few, codec="raw", transport="tcp", kv_tokens=1)


def test_workers_share_what_is_left_of_the_machine() -> None:
    measured = replace(_profile(), threads=1, beside=1.1, machine=replace(_profile().machine, cores=2))
    assert measured.shared() == SharedMachine(2.0, threads=1, pair=1.1)
    assert measured.shared(0.4, token_s=1e-3) == SharedMachine(1.6, threads=1, pair=1.1, token_s=1e-3)
    crowded = replace(measured, threads=2, beside=2.4)  # of which two threads on each core explain a factor of two
    assert crowded.shared().pair == pytest.approx(1.2)
    with pytest.raises(ConfigError, match="leave none"):
        measured.shared(2.0)
