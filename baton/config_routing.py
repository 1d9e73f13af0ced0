"""How the router chooses among workers."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from baton.config_types import Frozen

Strategy: TypeAlias = Literal["prefix_affinity", "least_ttft", "session", "least_load", "round_robin", "random"]
BLIND: tuple[Strategy, ...] = ("least_load", "round_robin", "random")  # these do not ask what workers have cached


class RoutingConfig(Frozen):
    strategy: Strategy = Field(
        default="prefix_affinity",
        description="Which worker takes a request. prefix_affinity: the one that holds most of the prompt, unless the "
        "wait there is long; least_ttft: the one that is through with it soonest; session: that of the request's "
        "session; least_load, round_robin, random: blind to caches, for comparison.",
    )
    affinity_factor: Annotated[float, Field(ge=1, le=100)] = Field(
        default=1.5,
        description="prefix_affinity goes to a cached prefix while the TTFT predicted there is at most this many times "
        "the least of all workers.",
    )
