"""Errors as gRPC statuses: the code, a message that names the field, and machine-readable details.

Details follow google.rpc: ``grpc-status-details-bin`` carries a Status with BadRequest (which field, why), ErrorInfo
(which of the code's causes it was) and RetryInfo (when to come back). ``grpc-retry-pushback-ms`` says the latter to
clients that retry by gRPC's own policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from baton.errors import BatonError

DETAILS_KEY = "grpc-status-details-bin"
DOMAIN = "baton"  # of the reasons in ErrorInfo
PUSHBACK_KEY = "grpc-retry-pushback-ms"
MAX_MESSAGE_BYTES = 600  # it travels in headers three times, escaped; clients refuse more than 8 KiB of them


class Context(Protocol):
    """The part of a gRPC servicer context that statuses are set on."""

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]: ...
    def set_code(self, code: grpc.StatusCode) -> None: ...
    def set_details(self, details: str) -> None: ...
    def set_trailing_metadata(self, metadata: list[tuple[str, str | bytes]]) -> None: ...


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """What the client receives in place of a result."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def of(error: BatonError) -> RpcStatus:
    """The status of ``error``."""
    code = grpc.StatusCode[error.code]
    message = _cut(str(error))
    rich = status_pb2.Status(code=code.value[0], message=message)
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=_cut(error.message))
        rich.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.reason:
        rich.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason.upper(), domain=DOMAIN))
    if error.retry_after_ms > 0:
        delay = Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        rich.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        metadata = ((PUSHBACK_KEY, str(error.retry_after_ms)),)
    return RpcStatus(code, message, ((DETAILS_KEY, rich.SerializeToString()), *metadata))


def metadata(context: Context) -> dict[str, str | bytes]:
    """What the client sent beside its request, by names in lower case; of a name's several values the last."""
    return dict(context.invocation_metadata())


def set_on(context: Context, error: BatonError) -> None:
    """Ends the call of ``context`` with the status of ``error``."""
    status = of(error)
    context.set_code(status.code)
    context.set_details(status.details)
    context.set_trailing_metadata(list(status.trailing_metadata))  # Serve adds it to a list of its own


def _cut(message: str) -> str:
    return message.encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore")
