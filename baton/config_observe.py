"""What router and workers tell about themselves: the section ``observe``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from baton.config_types import Frozen


class ObserveConfig(Frozen):
    log_format: Literal["text", "json"] = Field(
        default="text", description="Log lines of router and workers: text, or one JSON object each."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least that is logged."
    )
    log_prompts: bool = Field(
        default=False, description="Log the prompts that clients send. Off: no log holds text or tokens of theirs."
    )
    traces: bool = Field(
        default=False,
        description="Send OpenTelemetry spans as the standard `OTEL_*` variables say; needs the extra `otel`.",
    )
