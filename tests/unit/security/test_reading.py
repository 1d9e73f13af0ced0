"""A body that does not come to its end: the router waits for the whole of it, not for the next byte."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from starlette.requests import Request

from router.openai.errors import HttpError
from router.openai.reading import read
from router.openai.requests import TokenizeRequest

SCOPE = {"type": "http", "method": "POST", "path": "/tokenize", "headers": [(b"content-type", b"application/json")]}


def sent(*parts: bytes, every_s: float, ends: bool) -> Request:
    """A request whose client sends one part after the other, and then the end or white space for ever."""
    left = iter(parts)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(every_s)
        part = next(left, None)
        if part is None:
            return {"type": "http.request", "body": b"" if ends else b" ", "more_body": not ends}
        return {"type": "http.request", "body": part, "more_body": True}

    return Request(SCOPE, receive)


async def test_a_body_that_drips_is_given_up() -> None:
    began_s = time.monotonic()
    with pytest.raises(HttpError) as refused:
        await read(sent(b'{"prompt": "a"}', every_s=0.01, ends=False), TokenizeRequest, max_bytes=9999, within_s=0.3)
    assert (refused.value.status, refused.value.code) == (408, "request_timeout")
    assert refused.value.headers["Connection"] == "close"
    assert time.monotonic() - began_s < 3.0


async def test_one_that_arrives_in_time_is_read() -> None:
    request = sent(b'{"pro', b'mpt": "a"}', every_s=0.01, ends=True)
    assert (await read(request, TokenizeRequest, max_bytes=9999, within_s=10.0)).prompt == "a"


async def test_what_is_too_large_is_refused_while_it_comes() -> None:
    with pytest.raises(HttpError) as refused:
        await read(sent(b"x" * 60, b"x" * 60, every_s=0.0, ends=False), TokenizeRequest, max_bytes=100, within_s=10.0)
    assert refused.value.status == 413
