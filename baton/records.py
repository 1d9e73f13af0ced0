"""Typed records on msgpack: frozen dataclasses in, lists out, and back with every field's type checked.

Bytes from the wire are hostile, so :func:`unpack` bounds sizes while msgpack parses and checks each value against the
dataclass's annotations before anything is built. Never pickle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from operator import attrgetter
from typing import Any, NoReturn

import msgpack

from baton.errors import ProtocolError

FINGERPRINT_BYTES = 8
MAX_ARRAY_ITEMS = 1 << 20  # elements in any one array: a prompt of a million tokens


def pack(record: object) -> bytes:
    """``record`` (a dataclass registered in some :class:`Registry`) as msgpack bytes: ``[tag, *fields]``."""
    return bytes(msgpack.packb([type(record).__name__, *_fields(record)], default=_default, use_bin_type=True))


def _fields(record: object) -> Any:
    return _getter(typing.cast(Any, type(record)))(record)


@cache
def _getter(record: Any) -> Callable[[Any], Any]:
    """All fields of a ``record`` at once: per token there is time to read them, not to ask which they are."""
    names = [f.name for f in dataclasses.fields(record)]
    return attrgetter(*names) if len(names) > 1 else lambda value: [getattr(value, name) for name in names]


def _default(value: object) -> Any:
    if dataclasses.is_dataclass(value):
        return _fields(value)
    raise TypeError(f"cannot pack {type(value).__name__}")


class Registry:
    """The closed set of records that one protocol speaks; anything else on its wire is an error."""

    def __init__(self, *records: type) -> None:
        self._records: Mapping[str, type] = {record.__name__: record for record in records}
        # Of all names and types, those of nested records included: two processes that differ in it cannot talk.
        self.fingerprint = hashlib.sha256("\n".join(map(_schema, records)).encode()).digest()[:FINGERPRINT_BYTES]

    def unpack(self, body: bytes | memoryview) -> Any:
        """The record in ``body``. Raises :class:`ProtocolError` for anything that is not exactly one known record."""
        try:
            raw = msgpack.unpackb(
                body, raw=False, use_list=True, strict_map_key=True,
                max_array_len=min(MAX_ARRAY_ITEMS, len(body)), max_map_len=4096, max_ext_len=0,
            )  # fmt: skip
        except (ValueError, msgpack.UnpackException, RecursionError) as error:
            raise ProtocolError(f"not msgpack: {error}") from None
        if not isinstance(raw, list) or not raw or not isinstance(raw[0], str) or raw[0] not in self._records:
            raise ProtocolError(f"unknown record; known: {', '.join(self._records)}")
        return _build(self._records[raw[0]], raw[1:])


def _build(record: type, values: list[Any]) -> Any:
    names, kinds, checks = _checks(record)
    if len(values) != len(checks):
        raise ProtocolError(f"{record.__name__}: {len(values)} fields, expected {len(checks)}")
    built: list[Any] = []
    try:
        for kind, check, value in zip(kinds, checks, values, strict=True):
            built.append(value if type(value) is kind else check(value))
    except TypeError as error:
        raise ProtocolError(f"{record.__name__}.{names[len(built)]}: {error}") from None
    return record(*built)


def _schema(hint: Any) -> str:
    """A type as text that differs when the type, or one within it, does."""
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        fields = ", ".join(f"{f.name}: {_schema(hints[f.name])}" for f in dataclasses.fields(hint))
        return f"{typing.cast(type, hint).__name__}({fields})"
    if args := typing.get_args(hint):
        return f"{typing.get_origin(hint)}[{', '.join(map(_schema, args))}]"
    return str(hint)


@cache
def _checks(record: type) -> tuple[list[str], list[type | None], list[Callable[[Any], Any]]]:
    """Of every field: its name, the type whose values are right as they are, and the check for all other values."""
    names = [f.name for f in dataclasses.fields(record)]
    hints = typing.get_type_hints(record)
    return names, [_kind(hints[name]) for name in names], [_check(hints[name]) for name in names]


def _kind(hint: Any) -> type | None:
    if hint in (int, str, bytes, bool, float):
        return typing.cast(type, hint)
    return types.NoneType if typing.get_origin(hint) is types.UnionType else None


def _check(hint: Any) -> Callable[[Any], Any]:
    """A function that returns the value as ``hint`` demands it, or raises TypeError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is float:
        return _float
    if hint in (int, str, bytes, bool):
        return lambda value: value if type(value) is hint else _refuse(value, hint.__name__)
    if dataclasses.is_dataclass(hint):
        nested = typing.cast(type, hint)
        return lambda value: _build(nested, value) if isinstance(value, list) else _refuse(value, nested.__name__)
    if origin is types.UnionType and args[1:] == (type(None),):
        inner = _check(args[0])
        return lambda value: None if value is None else inner(value)
    if origin is tuple and args[1:] == (Ellipsis,):
        if args[0] is int:
            return _ints
        item = _check(args[0])
        return lambda value: tuple(map(item, value)) if isinstance(value, list) else _refuse(value, "list")
    if origin is dict and args[0] is str:
        item = _check(args[1])
        return lambda value: (
            {key if isinstance(key, str) else _refuse(key, "str"): item(v) for key, v in value.items()}
            if isinstance(value, dict)
            else _refuse(value, "map")
        )
    raise AssertionError(f"records cannot carry {hint!r}")


def _float(value: Any) -> float:
    return float(value) if type(value) in (int, float) else _refuse(value, "float")


def _ints(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        _refuse(value, "list of int")
    return tuple(value)


def _refuse(value: Any, wanted: str) -> NoReturn:
    raise TypeError(f"is {type(value).__name__}, expected {wanted}")
