"""OpenAI's service tiers and our classes in the body."""

from __future__ import annotations

from typing import Any

import pytest

from router.openai.requests import ChatRequest
from router.openai.translate import chat


@pytest.mark.parametrize(
    ("fields", "slo_class", "named"),
    [
        ({}, "", "baton.slo_class"),
        ({"service_tier": "auto"}, "", "baton.slo_class"),
        ({"service_tier": "default"}, "", "baton.slo_class"),
        ({"service_tier": "priority"}, "priority", "service_tier"),
        ({"baton": {"slo_class": "batch"}}, "batch", "baton.slo_class"),
        ({"baton": {"slo_class": "batch"}, "service_tier": "priority"}, "batch", "baton.slo_class"),
    ],
)
def test_a_body_names_its_class(fields: dict[str, Any], slo_class: str, named: str) -> None:
    body = ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], **fields})
    job = chat(body, "r")
    assert (job.request.slo_class, job.renamed["slo_class"]) == (slo_class, named)
