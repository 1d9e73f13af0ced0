"""The error tree. Each class says who must act.

    BatonError
    ├── InvalidRequest     the client is wrong: fix the named field       INVALID_ARGUMENT
    ├── NotFound           the client is wrong: no such thing             NOT_FOUND
    ├── Unauthenticated    the client is wrong: no key, or not a good one UNAUTHENTICATED
    ├── Forbidden          the client is wrong: its key is not for this   PERMISSION_DENIED
    ├── Overloaded         the client should come back later              RESOURCE_EXHAUSTED
    ├── DeadlineExceeded   nobody: the time the client gave is used up    DEADLINE_EXCEEDED
    ├── Cancelled          nobody: the client went away                   CANCELLED
    ├── Unavailable        retry elsewhere: a worker or link is gone      UNAVAILABLE
    ├── Internal           an operator: a bug, with the log beside it     INTERNAL
    └── ConfigError        an operator: the process must not start

Errors cross process boundaries as ``(code, message, field, retry_after_ms)``; :func:`from_code` rebuilds them. Where
clients decide by more than the code, ``reason`` says which of its causes it was; those below are OpenAI's error codes.
"""

from __future__ import annotations

from typing import ClassVar

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"  # the prompt, or it and the output, are longer than the context
RATE_LIMIT_EXCEEDED = "rate_limit_exceeded"  # the client's own limit, not the service's
INVALID_API_KEY = "invalid_api_key"
INSUFFICIENT_PERMISSIONS = "insufficient_permissions"
OPENAI_CODES = frozenset((CONTEXT_LENGTH_EXCEEDED, RATE_LIMIT_EXCEEDED, INVALID_API_KEY, INSUFFICIENT_PERMISSIONS))


class BatonError(Exception):
    """Base of every error that Baton raises on purpose. ``code`` is the gRPC status name."""

    code: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, field: str = "", retry_after_ms: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_ms = retry_after_ms
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class InvalidRequest(BatonError):
    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, message: str, *, reason: str = "") -> None:
        super().__init__(message, field=field, reason=reason)


class NotFound(BatonError):
    code = "NOT_FOUND"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message, field=field)


class Unauthenticated(BatonError):
    code = "UNAUTHENTICATED"

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=INVALID_API_KEY)


class Forbidden(BatonError):
    code = "PERMISSION_DENIED"

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=INSUFFICIENT_PERMISSIONS)


class Overloaded(BatonError):
    """``reason`` names the limit that refused the request, in words of [a-z_]; empty where a worker refused."""

    code = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(BatonError):
    code = "DEADLINE_EXCEEDED"


class Cancelled(BatonError):
    code = "CANCELLED"


class Unavailable(BatonError):
    code = "UNAVAILABLE"


class Internal(BatonError):
    code = "INTERNAL"


class ConfigError(BatonError):
    """A configuration value is wrong. ``field`` is the dotted path of the key."""

    code = "FAILED_PRECONDITION"


class ProtocolError(BatonError):
    """Bytes from the wire do not have the agreed shape; the connection they came on is closed."""

    code = "INTERNAL"


def from_code(code: str, message: str, *, field: str = "", retry_after_ms: int = 0, reason: str = "") -> BatonError:
    """The error that another process reported, as an exception of the matching class."""
    match code:
        case "INVALID_ARGUMENT":
            return InvalidRequest(field, message, reason=reason)
        case "NOT_FOUND":
            return NotFound(field, message)
        case "UNAUTHENTICATED":
            return Unauthenticated(message)
        case "PERMISSION_DENIED":
            return Forbidden(message)
        case "RESOURCE_EXHAUSTED":
            return Overloaded(message, field=field, retry_after_ms=retry_after_ms, reason=reason)
        case "DEADLINE_EXCEEDED":
            return DeadlineExceeded(message, field=field, reason=reason)
        case "CANCELLED":
            return Cancelled(message, field=field)
        case "UNAVAILABLE":
            return Unavailable(message, field=field, retry_after_ms=retry_after_ms, reason=reason)
        case _:
            return Internal(message, field=field)
