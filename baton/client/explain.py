"""gRPC's errors as ours: the matching class, the field at fault, when to come back (router/status.py, reversed)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from baton.errors import BatonError, from_code

DETAILS_KEY = "grpc-status-details-bin"
RESET = "RST_STREAM"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
MAX_PUSHBACK_DIGITS = 9


def explain(error: Any) -> BatonError:
    """The error that the server described, or gRPC itself. ``error``: a ``grpc.RpcError`` of a call."""
    told = _Told(error.details() or "no reason given")
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            with contextlib.suppress(DecodeError):  # a proxy's, not ours; the plain message remains
                told.read(status_pb2.Status.FromString(value))
        elif (
            key == PUSHBACK_KEY and not told.retry_after_ms and value.isdecimal() and len(value) <= MAX_PUSHBACK_DIGITS
        ):
            told.retry_after_ms = int(value)
    code = error.code().name
    if code == "CANCELLED" and RESET in told.message:  # the proxy's word for a router that died in the middle
        code = "UNAVAILABLE"
    return from_code(
        code,
        told.message,
        field=told.field,
        retry_after_ms=told.retry_after_ms,
        reason=told.reason,
    )


@dataclass(slots=True)
class _Told:
    message: str
    field: str = ""
    reason: str = ""
    retry_after_ms: int = 0

    def read(self, status: status_pb2.Status) -> None:
        bad, retry, info = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo(), error_details_pb2.ErrorInfo()
        for detail in status.details:
            if detail.Unpack(bad) and bad.field_violations:
                self.field, self.message = bad.field_violations[0].field, bad.field_violations[0].description
            elif detail.Unpack(retry):
                self.retry_after_ms = max(0, retry.retry_delay.ToMilliseconds())
            elif detail.Unpack(info):
                self.reason = info.reason.lower()
