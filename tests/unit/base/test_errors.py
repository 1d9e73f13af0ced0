"""Errors keep who must act when they cross a process boundary."""

from __future__ import annotations

import pytest

from baton import errors
from baton.errors import BatonError, from_code

CROSSING = [
    errors.InvalidRequest("sampling.top_p", "must be in (0, 1]"),
    errors.NotFound("model", "no such model"),
    errors.InvalidRequest("prompt", "too long", reason=errors.CONTEXT_LENGTH_EXCEEDED),
    errors.Unauthenticated("no key"),
    errors.Forbidden("not yours"),
    errors.Overloaded("full", retry_after_ms=250),
    errors.Overloaded("too often", retry_after_ms=250, reason=errors.RATE_LIMIT_EXCEEDED),
    errors.DeadlineExceeded("too late", field="budget_ms"),
    errors.Cancelled("gone"),
    errors.Unavailable("worker lost", retry_after_ms=1000),
    errors.Internal("a bug"),
]


@pytest.mark.parametrize("error", CROSSING, ids=lambda error: type(error).__name__)
def test_errors_are_rebuilt_from_what_crosses(error: BatonError) -> None:
    again = from_code(
        error.code, error.message, field=error.field, retry_after_ms=error.retry_after_ms, reason=error.reason
    )
    assert type(again) is type(error)
    assert again.reason == error.reason
    assert (str(again), again.field, again.retry_after_ms) == (str(error), error.field, error.retry_after_ms)


def test_unknown_codes_are_internal() -> None:
    assert type(from_code("DATA_LOSS", "odd")) is errors.Internal


def test_the_field_leads_the_message() -> None:
    assert str(CROSSING[0]) == "sampling.top_p: must be in (0, 1]"
    assert str(errors.Internal("a bug")) == "a bug"


def test_every_code_is_a_grpc_status() -> None:
    import grpc

    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, BatonError)]
    assert len(classes) >= 9
    assert {cls.code for cls in classes} <= {code.name for code in grpc.StatusCode}
