"""Records survive the wire unchanged, and nothing else passes for one."""

from __future__ import annotations

import dataclasses
import pickle
import types
import typing
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton import messages
from baton.errors import ProtocolError
from baton.messages import PLANE, Cancel, Failed, Report, Tokens
from baton.records import MAX_ARRAY_ITEMS, Registry, pack
from baton.request import Logprob, Sampling, TokenEvent, Work

RECORDS = [
    value
    for value in vars(messages).values()
    if dataclasses.is_dataclass(value) and isinstance(value, type) and value.__module__ == messages.__name__
]
ON_THE_WIRE = [record for record in RECORDS if record is not messages.Ticket]  # Ticket only travels inside others

INT64 = st.integers(-(2**63), 2**63 - 1)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a field annotated with ``hint``."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return instances(typing.cast(type, hint))
    if origin is types.UnionType:
        return st.none() | values(args[0])
    if origin is tuple:
        return st.lists(values(args[0]), max_size=4).map(tuple)
    if origin is dict:
        return st.dictionaries(st.text(max_size=8), values(args[1]), max_size=4)
    simple = {int: INT64, float: st.floats(allow_nan=False), str: st.text(max_size=20), bool: st.booleans()}
    return simple[hint]


def instances(record: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(record)
    fields = {field.name: values(hints[field.name]) for field in dataclasses.fields(record)}
    return st.builds(record, **fields)


def test_every_message_is_on_the_plane() -> None:
    for record in ON_THE_WIRE:
        with pytest.raises(ProtocolError, match="fields, expected"):
            PLANE.unpack(msgpack.packb([record.__name__, *range(50)]))


@given(st.sampled_from(ON_THE_WIRE).flatmap(instances))
def test_records_come_back_equal(record: object) -> None:
    assert PLANE.unpack(pack(record)) == record


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_a_protocol_error(body: bytes) -> None:
    try:
        record = PLANE.unpack(body)
    except ProtocolError:
        return
    assert type(record) in ON_THE_WIRE


JUNK = st.recursive(
    st.none() | st.booleans() | INT64 | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(st.sampled_from(ON_THE_WIRE), st.lists(JUNK, max_size=12))
def test_any_fields_are_checked_against_the_annotations(record: type, fields: list[Any]) -> None:
    try:
        built = PLANE.unpack(msgpack.packb([record.__name__, *fields]))
    except ProtocolError:
        return
    assert PLANE.unpack(pack(built)) == built or "nan" in repr(built)


@given(st.sampled_from(ON_THE_WIRE).flatmap(instances), st.data())
def test_damaged_frames_never_escape_as_another_error(record: object, data: st.DataObject) -> None:
    body = bytearray(pack(record))
    place = data.draw(st.integers(0, len(body) - 1))
    body[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))
    for damaged in (bytes(body), bytes(body[:cut]), bytes(body) + b"\x00"):
        try:
            PLANE.unpack(damaged)
        except ProtocolError:
            continue


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (pack(Cancel("a")) + b"\x00", "not msgpack"),  # trailing bytes
        (msgpack.packb(["Cancel"]), "0 fields, expected 1"),
        (msgpack.packb(["Cancel", "a", "b"]), "2 fields, expected 1"),
        (msgpack.packb(["Cancel", b"a"]), "Cancel.request_id: is bytes, expected str"),
        (msgpack.packb(["Nothing", 1]), "unknown record"),
        (msgpack.packb([["Cancel"], "a"]), "unknown record"),
        (msgpack.packb({"Cancel": "a"}), "unknown record"),
        (msgpack.packb([]), "unknown record"),
        (msgpack.packb(["Ticket", "r"]), "unknown record"),  # known to Python, not to this protocol
        (msgpack.packb(["Report", "r", {"prefill": "long"}, 0.0, 0, {}, ""]), "Report.stages: is str, expected float"),
        (msgpack.packb(["Report", "r", {1: 2.0}, 0.0, 0, {}, ""]), "not msgpack"),
        (msgpack.packb(["Tokens", [1]]), "Tokens.events: is int, expected TokenEvent"),
        (msgpack.packb(["Tokens", "abc"]), "Tokens.events: is str, expected list"),
        (msgpack.packb(["Failed", "r", "C", "m", "f", True, ""]), "Failed.retry_after_ms: is bool, expected int"),
        (msgpack.packb(["Failed", "r", "C", "m", "f", 1.0, ""]), "Failed.retry_after_ms: is float, expected int"),
        (msgpack.packb(["Cancel", msgpack.ExtType(4, b"x")]), "not msgpack"),
        (b"\xdd" + (MAX_ARRAY_ITEMS + 1).to_bytes(4, "big"), "not msgpack"),  # refused before any item is read
        (b"\x91" * 100_000, "not msgpack"),  # nested without end
        (b"\x92\xa6Cancel\xa1\xff", "not msgpack"),  # not UTF-8
    ],
)
def test_what_is_wrong_is_said(body: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        PLANE.unpack(body)


def test_pickle_is_not_understood() -> None:
    with pytest.raises(ProtocolError):
        PLANE.unpack(pickle.dumps(Cancel("a")))


def test_an_int_is_accepted_where_a_float_belongs() -> None:
    report = PLANE.unpack(msgpack.packb(["Report", "r", {"prefill": 1}, 2, 3, {}, ""]))
    assert report == Report("r", {"prefill": 1.0}, 2.0, 3)
    assert type(report.stages["prefill"]) is float


def test_nested_records_and_long_prompts() -> None:
    event = TokenEvent("r", 3, 17, -0.25, (Logprob(1, -0.5), Logprob(2, -1.5)), "stop")
    assert PLANE.unpack(pack(Tokens((event, event)))) == Tokens((event, event))
    work = Work("r", tuple(range(100_000)), Sampling(stop_token_ids=(1, 2)), -3, 1.5)
    assert PLANE.unpack(pack(messages.Decode(work))) == messages.Decode(work)


def test_what_is_no_record_cannot_be_packed() -> None:
    with pytest.raises(TypeError, match="cannot pack set"):
        pack(Failed("r", {"not", "text"}, ""))  # type: ignore[arg-type]


def test_annotations_that_cannot_travel_are_found_at_first_use() -> None:
    @dataclasses.dataclass(frozen=True, slots=True)
    class Odd:
        value: complex

    with pytest.raises(AssertionError, match="complex"):
        Registry(Odd).unpack(msgpack.packb(["Odd", 1]))
