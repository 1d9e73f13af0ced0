"""A request's body, read within limits and checked: bytes in, a model of ``requests`` or an :class:`HttpError` out."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from router.openai import errors
from router.openai.errors import HttpError
from router.openai.requests import Body

LONG_BODY_BYTES = 16 << 10  # longer ones are parsed on a thread: 16 KiB take about 0.2 ms of the event loop

B = TypeVar("B", bound=Body)


async def read(request: Request, kind: type[B], *, max_bytes: int, within_s: float) -> B:
    """The body of ``request``. Nothing beyond ``max_bytes`` is kept, whatever the client claims its length to be, and
    a client that has not sent all of it ``within_s`` is not waited for.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        message = f"Unsupported content type {media[:64]!r}; this method accepts 'application/json'."
        raise HttpError(415, message, code="unsupported_content_type")
    try:
        async with asyncio.timeout(within_s):
            body = await _bytes(request, max_bytes)
    except TimeoutError:
        raise HttpError(
            408,
            f"the body did not arrive within {within_s:g} s",
            code="request_timeout",
            headers={"Connection": "close"},
        ) from None
    return await asyncio.to_thread(parse, body, kind) if len(body) > LONG_BODY_BYTES else parse(body, kind)


def parse(body: bytes, kind: type[B]) -> B:
    """Raises :class:`HttpError` that names the field at fault."""
    try:
        tree = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise HttpError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise errors.of_validation(error, tree) from None


async def _bytes(request: Request, max_bytes: int) -> bytes:
    claimed = request.headers.get("content-length", "")
    if claimed.isdecimal() and int(claimed[:20]) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> HttpError:
    return HttpError(413, f"the body is larger than {max_bytes} bytes", code="request_too_large")
