"""Who is let in: classes of requests with their objectives, the line in front of the workers, and rates of a tenant."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from baton.config_types import Count, Frozen, Seconds

Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[int, Field(ge=0)]


class ClassConfig(Frozen):
    """What requests of one class are promised. A request of which this cannot be kept is refused at once."""

    ttft_ms: Milliseconds = Field(default=0.0, description="Objective for the first token; 0: none but the deadline.")
    tpot_ms: Milliseconds = Field(default=0.0, description="Objective per later token; 0: none.")
    priority: Annotated[int, Field(ge=-100, le=100)] = Field(
        default=0, description="Added to the request's own; larger is served earlier and shed later."
    )
    service_tier: str = Field(default="", description="Value of OpenAI's service_tier that means this class.")


def _classes() -> dict[str, ClassConfig]:
    return {
        "interactive": ClassConfig(ttft_ms=2000.0, tpot_ms=200.0, priority=10, service_tier="priority"),
        "standard": ClassConfig(),
        "batch": ClassConfig(priority=-10, service_tier="flex"),
    }


class AdmissionConfig(Frozen):
    classes: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")], ClassConfig] = Field(
        default_factory=_classes, description="Classes by name, each with its objectives and priority."
    )
    default_class: str = Field(default="standard", description="Class of requests that name none.")
    predict: bool = Field(
        default=True,
        description="Refuse what is predicted to miss its class's objectives or its deadline, and shed what has come "
        "to that. Otherwise only full lines and limits refuse.",
    )
    max_waiting: Count = Field(
        default=256, description="Most requests that wait at one router for their turn; beyond it RESOURCE_EXHAUSTED."
    )
    lead_ms: Milliseconds = Field(
        default=250.0,
        description="Prompt work that a worker is given ahead. What comes beyond it waits at the router, where the "
        "most urgent goes first.",
    )
    aging_s: Seconds = Field(
        default=5.0, description="Waiting for so long is worth one level of priority, so that nobody starves."
    )
    requests_per_minute: Rate = Field(
        default=0, description="Most requests of a tenant without limits of its own; 0: any number."
    )
    tokens_per_minute: Rate = Field(
        default=0,
        description="Most tokens, of prompts and outputs, of a tenant without limits of its own; 0: any number.",
    )

    @model_validator(mode="after")
    def _default_exists(self) -> AdmissionConfig:
        if self.default_class not in self.classes:
            known = ", ".join(sorted(self.classes))
            raise ValueError(f"default_class {self.default_class!r} is none of the classes: {known}")
        tiers = [one.service_tier for one in self.classes.values() if one.service_tier]
        if len(set(tiers)) < len(tiers):
            raise ValueError("two classes have the same service_tier")
        return self
