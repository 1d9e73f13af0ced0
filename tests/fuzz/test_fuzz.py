"""The fuzz targets without atheris: every kept input, and what Hypothesis invents. ``make fuzz`` goes on for longer."""

from __future__ import annotations

import functools
import runpy
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.config_handoff import CODECS
from baton.messages import PLANE
from baton.records import pack
from kvtransfer.protocol import CONTROL

HERE = Path(__file__).resolve().parent
KEPT = sorted((HERE / "corpus").glob("*/*"))
EXAMPLES = {"record": 300, "frames": 150, "sealed": 100, "handshake": 100, "codec": 300, "receiver": 60, "sender": 60}

quick = functools.partial(settings, deadline=None, suppress_health_check=list(HealthCheck))


@functools.cache
def module() -> dict[str, Any]:
    """Loaded once: its receiver and sender live as long as the test run."""
    return runpy.run_path(str(HERE / "targets.py"))


def target(name: str) -> Callable[[bytes], None]:
    found: Callable[[bytes], None] = module()["TARGETS"][name]
    return found


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_kept_input(path: Path) -> None:
    target(path.parent.name)(path.read_bytes())


def test_every_target_has_kept_inputs() -> None:
    assert {path.parent.name for path in KEPT} == set(module()["TARGETS"]) == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_any_bytes(name: str) -> None:
    @quick(max_examples=EXAMPLES[name])
    @given(st.binary(max_size=300))
    def run(data: bytes) -> None:
        target(name)(data)

    run()


@quick(max_examples=300)
@given(st.sampled_from(list(CONTROL._records) + list(PLANE._records)), st.binary(max_size=120), st.data())
def test_a_record_changed_anywhere(kind: str, filling: bytes, data: st.DataObject) -> None:
    """Genuine records with one byte changed, removed or added: as bytes and as a frame."""
    made = module()
    known = {**PLANE._records, **CONTROL._records}[kind]
    live = made["LIVE"]
    body = bytearray(pack(live["filled"](known, made["Bytes"](filling), live["opened"]())))
    at = data.draw(st.integers(0, len(body) - 1))
    match data.draw(st.sampled_from(("change", "remove", "add", "nothing"))):
        case "change":
            body[at] = data.draw(st.integers(0, 255))
        case "remove":
            del body[at]
        case "add":
            body.insert(at, data.draw(st.integers(0, 255)))
    target("record")(bytes(body))
    target("frames")(struct.pack("<I", len(body)) + body)


@pytest.mark.parametrize("codec", range(len(CODECS)), ids=CODECS)
def test_a_genuine_block_changed_anywhere(codec: int) -> None:
    @quick(max_examples=60)
    @given(st.integers(0, 2), st.integers(0, 6), st.integers(1, 3), st.binary(min_size=4, max_size=60))
    def run(layout: int, count: int, place: int, changes: bytes) -> None:
        target("codec")(struct.pack("<HHHH", codec, layout, count, place) + changes)

    run()


@pytest.mark.parametrize("depth", [1, 100, 1023, 5000])
@pytest.mark.parametrize("claim", [1 << 10, 1 << 20, (1 << 32) - 1])
def test_claims_of_nested_arrays_take_no_room(depth: int, claim: int) -> None:
    target("record")((b"\xdd" + claim.to_bytes(4, "big")) * depth)


def test_the_largest_frame_of_the_smallest_objects_takes_what_its_bytes_cost() -> None:
    inner = b"\xdd" + (1 << 20).to_bytes(4, "big") + b"\x90" * (1 << 20)
    target("record")(b"\x92\xa5Begin" + inner)
