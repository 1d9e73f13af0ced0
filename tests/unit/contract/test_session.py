"""The session of a request: named by the client, a digest to workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
from pydantic import ValidationError

from baton.errors import InvalidRequest
from baton.wire import inference_pb2 as pb
from router.openai import translate
from router.openai.requests import ChatRequest
from router.validate import MAX_SESSION_CHARS, ParsedRequest

Parsed: TypeAlias = Callable[..., ParsedRequest]


def test_equal_names_are_one_session_and_no_name_is_none(parsed: Parsed) -> None:
    ann, again, bob, none = (
        parsed(pb.GenerateRequest(prompt="hi", session=name)).work("r").session for name in ("Ann", "Ann", "Bob", "")
    )
    assert ann == again != bob
    assert none == ""
    assert "Ann" not in ann


def test_a_name_that_is_too_long_is_refused(parsed: Parsed) -> None:
    assert parsed(pb.GenerateRequest(prompt="hi", session="é" * MAX_SESSION_CHARS)).session
    with pytest.raises(InvalidRequest, match="257 characters") as refused:
        parsed(pb.GenerateRequest(prompt="hi", session="x" * (MAX_SESSION_CHARS + 1)))
    assert refused.value.field == "session"


@pytest.mark.parametrize(
    ("fields", "session"),
    [
        ({}, ""),
        ({"user": "u"}, "u"),
        ({"prompt_cache_key": "k"}, "k"),
        ({"user": "u", "prompt_cache_key": "k"}, "k"),
        ({"user": None, "prompt_cache_key": None}, ""),
    ],
)
def test_openais_fields_name_it(fields: dict[str, Any], session: str) -> None:
    body = ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], **fields})
    assert translate.chat(body, "r").request.session == session


def test_openais_names_have_the_same_limit() -> None:
    with pytest.raises(ValidationError, match="at most 256"):
        ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], "user": "x" * 257})
