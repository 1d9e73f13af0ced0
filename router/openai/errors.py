"""Errors as HTTP answers in OpenAI's shape: a status, headers, and ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from baton.errors import OPENAI_CODES, BatonError
from router.openai.answers import Error, ErrorDetail, text

INVALID = "invalid_request_error"
SERVER = "server_error"
MAX_MESSAGE_CHARS = 1000
STATUSES: Mapping[str, tuple[int, str, str | None]] = {  # gRPC's code: HTTP's status, type and code of the error
    "INVALID_ARGUMENT": (400, INVALID, "invalid_value"),
    "UNAUTHENTICATED": (401, INVALID, "invalid_api_key"),
    "PERMISSION_DENIED": (403, INVALID, "insufficient_permissions"),
    "NOT_FOUND": (404, INVALID, "model_not_found"),
    "RESOURCE_EXHAUSTED": (429, "rate_limit_error", "overloaded"),
    "CANCELLED": (499, SERVER, "cancelled"),
    "UNAVAILABLE": (503, SERVER, "unavailable"),
    "DEADLINE_EXCEEDED": (504, "timeout_error", "deadline_exceeded"),
}
INTERNAL = (500, SERVER, "internal_error")


class HttpError(Exception):
    """A request's end: what the client receives in place of a result."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = headers or {}
        self.parsed = False  # whether it was a request of the contract, which the service has counted

    @property
    def body(self) -> str:
        message = self.message[:MAX_MESSAGE_CHARS]
        return text(Error(error=ErrorDetail(message=message, type=self.kind, param=self.param, code=self.code)))


def of(error: BatonError, renamed: Mapping[str, str]) -> HttpError:
    """``error`` of the gRPC contract. renamed: the client's names for fields of the contract (see ``translate``)."""
    status, kind, code = STATUSES.get(error.code, INTERNAL)
    param = _param(error.field, renamed)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if error.retry_after_ms > 0:
        headers = {
            "Retry-After": str(math.ceil(error.retry_after_ms / 1000)),
            "Retry-After-Ms": str(error.retry_after_ms),
        }
    message = f"{param}: {error.message}" if param else error.message
    code = error.reason if error.reason in OPENAI_CODES else code
    made = HttpError(status, message, kind=kind, param=param, code=code, headers=headers)
    made.parsed = True
    return made


def _param(path: str, renamed: Mapping[str, str]) -> str | None:
    """``path`` in the client's words: the longest renamed beginning counts."""
    for name in sorted(renamed, key=len, reverse=True):
        if path == name or path.startswith((f"{name}[", f"{name}.")):
            return renamed[name] + path[len(name) :]
    return path.removeprefix("sampling.") or None


def of_validation(error: ValidationError, body: Any) -> HttpError:
    """What is wrong with ``body``, the JSON value that ``error`` is about: its deepest fault, the first of several."""
    faults: dict[str, list[dict[str, Any]]] = {}
    for fault in error.errors(include_url=False, include_context=False):
        faults.setdefault(_path(fault["loc"], fault["type"], body), []).append(dict(fault))
    param, at_fault = max(faults.items(), key=lambda item: max(len(fault["loc"]) for fault in item[1]))
    kinds = {fault["type"] for fault in at_fault}
    if "extra_forbidden" in kinds:
        return HttpError(400, f"Unknown parameter: {param!r}.", param=param, code="unknown_parameter")
    if "none_required" in kinds:
        return HttpError(400, f"{param} is not supported here.", param=param, code="unsupported_parameter")
    if "missing" in kinds:
        return HttpError(400, f"{param} is missing.", param=param, code="missing_required_parameter")
    whys = dict.fromkeys(str(fault["msg"]).removeprefix("Value error, ") for fault in at_fault)
    message = f"{param or 'the body'}: {'; or '.join(whys)}"
    return HttpError(400, message, param=param or None, code="invalid_value")


def _path(loc: Sequence[str | int], kind: str, body: Any) -> str:
    """``messages[0].role``. Of a union pydantic names the alternative too, which is no part of the body: skipped."""
    path, value = "", body
    for at, part in enumerate(loc):
        last = at == len(loc) - 1
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            path, value = f"{path}[{part}]", value[part]
        elif isinstance(value, dict) and (part in value or (last and kind == "missing")):
            path, value = f"{path}.{part}" if path else str(part), value.get(part)
    return path
