"""The OpenAPI document of the HTTP front, made from the models that check and make its bodies. Pure."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import baton
from router.openai import answers, requests

REFS = "#/components/schemas/{model}"
ERRORS = {
    400: "The named field is wrong.",
    401: "An API key is needed, or this is not one.",
    404: "No such model or path.",
    405: "The path has no such method.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too much is waiting; Retry-After says when to come back.",
    500: "A defect; the router's log has more.",
    503: "A worker is gone or not there yet; safe to retry.",
    504: "The request's time is used up.",
}
FORBIDDEN = {403: "This needs an operator's API key."}
TAKES: tuple[type[BaseModel], ...] = (
    requests.ChatRequest,
    requests.CompletionRequest,
    requests.TokenizeRequest,
    requests.DetokenizeRequest,
)
GIVES: tuple[type[BaseModel], ...] = (
    answers.ChatCompletion,
    answers.ChatChunk,
    answers.Completion,
    answers.CompletionChunk,
    answers.ModelList,
    answers.Model,
    answers.Tokens,
    answers.Text,
    answers.Health,
    answers.Error,
)


@cache
def text() -> str:
    """The document as JSON."""
    return json.dumps(document(), ensure_ascii=False)


def document() -> dict[str, Any]:
    wanted = [*((model, "validation") for model in TAKES), *((model, "serialization") for model in GIVES)]
    _, schemas = models_json_schema(wanted, ref_template=REFS)  # type: ignore[arg-type]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Baton",
            "version": baton.__version__,
            "description": "Text generation in the form of OpenAI's API; see docs/openai.md.",
        },
        "paths": _paths(),
        "components": {"schemas": schemas["$defs"]},
    }


def _paths() -> dict[str, Any]:
    chat = _streams(answers.ChatCompletion, answers.ChatChunk)
    completion = _streams(answers.Completion, answers.CompletionChunk)
    model_id = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {
        "/v1/chat/completions": _post("chat", "Answers a conversation.", requests.ChatRequest, chat),
        "/v1/completions": _post("completions", "Continues a prompt.", requests.CompletionRequest, completion),
        "/v1/embeddings": {"post": _operation("embeddings", "Refused: no embeddings are served.", {}, (400, 401))},
        "/v1/models": _get("models", "The served models.", _json(answers.ModelList), ()),
        "/v1/models/{model}": {
            **_get("model", "One served model.", _json(answers.Model), (404,)),
            "parameters": [model_id],
        },
        "/tokenize": _post("tokenize", "Token ids of a prompt.", requests.TokenizeRequest, _json(answers.Tokens)),
        "/detokenize": _post("detokenize", "Text of token ids.", requests.DetokenizeRequest, _json(answers.Text)),
        "/health": {
            "get": {
                "operationId": "health",
                "summary": "Whether a request could be served now.",
                "responses": {
                    "200": {"description": "It could.", "content": _json(answers.Health)},
                    "503": {"description": "It could not.", "content": _json(answers.Health)},
                },
            }
        },
        "/metrics": _get(
            "metrics", "Prometheus's text format.", {"text/plain": {"schema": {"type": "string"}}}, (403,)
        ),
        "/openapi.json": _get("openapi", "This document.", {"application/json": {"schema": {"type": "object"}}}, ()),
    }


def _post(name: str, summary: str, takes: type[BaseModel], gives: dict[str, Any]) -> dict[str, Any]:
    operation = _operation(name, summary, gives, tuple(ERRORS))
    operation["requestBody"] = {"required": True, "content": _json(takes)}
    return {"post": operation}


def _get(name: str, summary: str, gives: dict[str, Any], errors: tuple[int, ...]) -> dict[str, Any]:
    return {"get": _operation(name, summary, gives, (401, *errors, 405, 500))}


def _operation(name: str, summary: str, gives: dict[str, Any], errors: tuple[int, ...]) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": "Done.", "content": gives}} if gives else {}
    for status in errors:
        responses[str(status)] = {"description": (ERRORS | FORBIDDEN)[status], "content": _json(answers.Error)}
    return {"operationId": name, "summary": summary, "responses": responses}


def _streams(whole: type[BaseModel], chunk: type[BaseModel]) -> dict[str, Any]:
    """``whole``, or events whose data are a ``chunk`` each; the schema is that of one event, as OpenAPI 3.2 has it."""
    data = {
        "type": "string",
        "description": f"JSON of a {chunk.__name__}; at the end [DONE], or an Error if the stream did not end well.",
    }
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return _json(whole) | {"text/event-stream": {"schema": event}}


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REFS.format(model=model.__name__)}}}
