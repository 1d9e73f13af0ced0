"""The one Serve application: what it says, and that a local start gives Serve the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.build_app import build_app
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve.config import AutoscalingConfig
from ray.serve.deployment import deployment_to_schema
from ray.serve.schema import DeploymentSchema, RayActorOptionsSchema, ServeDeploySchema

from baton.config import Config, parse
from baton.errors import ConfigError
from baton.messages import Load
from deploy import scaling
from deploy.app import assemble, build
from deploy.serve_config import ONLY_SERVES, application, deployments, serve_config

CONFIGS = {
    "defaults": {},
    "one pool": {"prefill": {"replicas": 0}},
    "GPUs": {
        "name": "big",
        "prefill": {"replicas": 2, "tensor_parallel": 4, "gpus": 1, "resources": {"prefill": 1}, "drain_s": 90},
        "decode": {"replicas": 3, "tensor_parallel": 2, "gpus": 1, "resources": {"decode": 1}, "surge_percent": 0},
        "router": {"replicas": 2, "resources": {"router": 1}, "drain_s": 60, "max_inflight": 64},
    },
    "scaling": {"decode": {"replicas": 2, "min_replicas": 1, "max_replicas": 6, "target_load": 0.5}},
}


def options(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in deployments(parse(tree))}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_local_start_gives_serve_what_the_file_lists(name: str) -> None:
    app = application(parse(CONFIGS[name]))
    built = build_app(assemble(app["args"], app["deployments"]), name=app["name"])
    local = {one.name: comparable(deployment_to_schema(one)) for one in built.deployments}
    listed = {one["name"]: comparable(DeploymentSchema(**one)) for one in app["deployments"]}
    assert local == listed
    assert built.ingress_deployment_name == "router"


def comparable(schema: DeploymentSchema) -> dict[str, Any]:
    """What was set, with the defaults that Serve fills in for code filled in for both."""
    found = schema.model_dump(exclude_unset=True)
    scaling = found.pop("autoscaling_config", None)
    found["scaling"] = scaling and AutoscalingConfig.model_validate(scaling).model_dump()
    found.setdefault("num_replicas", None)
    found["ray_actor_options"] = RayActorOptionsSchema.model_validate(found["ray_actor_options"]).model_dump()
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_serve_takes_it_and_the_arguments_are_the_configuration(name: str) -> None:
    config = parse(CONFIGS[name])
    (app,) = ServeDeploySchema.model_validate(serve_config(config)).applications
    assert app.name == config.name
    assert for_replicas(parse(app.args)) == for_replicas(config)
    build_app(build(app.args), name=app.name)  # what Serve does with it on a cluster, before it puts the file's options


def for_replicas(config: Config) -> dict[str, Any]:
    """Everything but what only Serve acts on."""
    tree = config.model_dump()
    for role in ("prefill", "decode"):
        tree[role] = {key: value for key, value in tree[role].items() if key not in ONLY_SERVES}
    del tree["router"]["replicas"]
    return tree


def code_version(tree: dict[str, Any]) -> str:
    """What Serve compares: another one restarts every replica."""
    (app,) = ServeDeploySchema.model_validate(serve_config(parse(tree))).applications
    return get_app_code_version(app)


def pools(**decode: Any) -> dict[str, Any]:
    return {"prefill": {"threads": 2}, "decode": {"threads": 2, "min_replicas": 1, **decode}}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (pools(replicas=2), pools(replicas=3)),
        (pools(max_replicas=2), pools(replicas=2, max_replicas=8)),
        (pools(), pools(surge_percent=0)),
        (pools(), {**pools(), "router": {"replicas": 2}}),
    ],
)
def test_a_number_of_replicas_restarts_none(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert deployments(parse(before)) != deployments(parse(after))
    assert code_version(before) == code_version(after)


def test_what_replicas_act_on_restarts_them() -> None:
    assert code_version(pools()) != code_version(pools(max_running=7))
    assert code_version(pools()) != code_version({**pools(), "prefill": {"replicas": 0}})
    # Workers that divide the cores by their number must know it.
    assert code_version({"decode": {"replicas": 2}}) != code_version({"decode": {"replicas": 3}})


def test_a_worker_asks_for_all_its_ranks_at_once() -> None:
    actor = options(CONFIGS["GPUs"])["prefill"]["ray_actor_options"]
    assert actor == {"num_cpus": 2.0, "num_gpus": 4.0, "resources": {"prefill": 4.0}}
    assert "num_gpus" not in options({})["decode"]["ray_actor_options"]


def test_a_replica_outlives_its_drain() -> None:
    found = {name: one["graceful_shutdown_timeout_s"] for name, one in options(CONFIGS["GPUs"]).items()}
    assert found == {"prefill": 95.0, "decode": 35.0, "router": 65.0}


def test_limits_of_scaling_reach_serve() -> None:
    scaled = options(CONFIGS["scaling"])
    autoscaling = scaled["decode"]["autoscaling_config"]
    assert [autoscaling[f"{which}_replicas"] for which in ("min", "initial", "max")] == [1, 2, 6]
    assert autoscaling["policy"]["policy_kwargs"] == {"target": 0.5}
    assert "num_replicas" not in scaled["decode"]
    assert scaled["prefill"]["num_replicas"] == 1


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"decode": {"replicas": 7, "max_replicas": 6}}, "replicas 7 must lie between min_replicas 1 and max_replicas"),
        ({"prefill": {"tensor_parallel": 2, "gpus": 0.5}}, "ranks of one worker need a GPU each: gpus is 0.5"),
        ({"prefill": {"drain_s": 0}}, "greater than 0"),
        ({"prefill": {"surge_percent": 101}}, "less than or equal to 100"),
    ],
)
def test_what_cannot_be_deployed_is_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(tree)


# ---- scaling


def load(**held: Any) -> Load:
    empty = dict.fromkeys(
        ("waiting", "waiting_tokens", "running", "pages_used", "pages_total", "handoffs", "buffer_bytes_used",
         "buffer_bytes_total", "buffer_bytes_quarantined"), 0,
    )  # fmt: skip
    return Load(**{**empty, **held})


class Seen:
    """What a policy reads of Serve's context."""

    def __init__(self, target_num_replicas: int, loads: dict[str, float] | None) -> None:
        self.target_num_replicas = target_num_replicas
        self.aggregated_metrics = None if loads is None else {scaling.LOAD: loads}


def test_loads_of_workers() -> None:
    assert scaling.prefill_load(load(waiting_tokens=500, prompt_token_s=0.004)) == 2.0
    assert scaling.prefill_load(load(waiting_tokens=500)) == 0.0
    assert scaling.decode_load(load(running=6, waiting=2, pages_used=10, pages_total=100), 8) == 1.0
    assert scaling.decode_load(load(running=1, pages_used=90, pages_total=100), 8) == 0.9
    assert scaling.decode_load(load(), 8) == 0.0


def test_a_pool_without_reports_stays_as_it_is() -> None:
    assert scaling.LoadPolicy(0.7)(Seen(3, None)) == (3, {})
    assert scaling.LoadPolicy(0.7)(Seen(3, {})) == (3, {})


def test_a_full_pool_grows_and_an_idle_one_shrinks() -> None:
    policy = scaling.LoadPolicy(0.5)
    assert policy(Seen(2, {"a": 1.0, "b": 1.0})) == (4, {})
    assert policy(Seen(2, {"a": 0.5, "b": 0.5})) == (2, {})
    assert policy(Seen(2, {"a": 0.0, "b": 0.1})) == (1, {})


@given(st.lists(st.floats(0, 50), min_size=1, max_size=20), st.floats(0.1, 1.0))
def test_wanted_workers_are_just_enough(loads: list[float], target: float) -> None:
    count = scaling.wanted(dict(enumerate(loads)), target)
    assert sum(loads) / count <= target * (1 + 1e-6)
    assert count == 1 or sum(loads) / (count - 1) > target * (1 - 1e-6)
    assert math.isfinite(count)


def test_the_default_configuration_needs_no_argument() -> None:
    assert application(Config())["args"] == {}
