"""Templates for `ray up`: Ray's own validators take them, and they have room for what Serve is told to run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from baton.config import load
from deploy.serve_config import deployments

ROOT = Path(__file__).resolve().parents[3]
RAY = ROOT / "deploy" / "ray"
TEMPLATES = ("on-prem", "aws")
POOLS = {"prefill", "decode", "router"}


def template(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((RAY / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


def wanted() -> dict[str, dict[str, float]]:
    """What a replica of each deployment asks for."""
    found = {}
    for one in deployments(load(RAY / "app" / "baton.yaml")):
        actor = one["ray_actor_options"]
        found[one["name"]] = {"CPU": actor["num_cpus"], "GPU": actor.get("num_gpus", 0.0), **actor["resources"]}
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_ray_takes_it(name: str) -> None:
    validate_config(prepare_config(template(name)))


BROKEN: list[tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = [
    (lambda t: t.update(max_worker=3), ValidationError, "'max_worker' was unexpected"),
    (lambda t: t.pop("provider"), KeyError, "provider"),
    (lambda t: t.update(head_node_type="boss"), ValueError, "`head_node_type` must be one of"),
    (
        lambda t: t["available_node_types"]["decode"].update(min_workers=20),
        ValueError,
        "`max_workers` is smaller than the sum of `min_workers`",
    ),
    (
        lambda t: t["available_node_types"]["decode"].update(resource={"GPU": 8}),
        ValidationError,
        "'resource' was unexpected",
    ),
]


@pytest.mark.parametrize("index", range(len(BROKEN)))
def test_ray_refuses_what_is_broken(index: int) -> None:
    broken = copy.deepcopy(template("aws"))
    change, error, words = BROKEN[index]
    change(broken)
    with pytest.raises(error, match=words):
        validate_config(prepare_config(broken))


def test_each_pool_on_aws_has_nodes_with_room() -> None:
    types = template("aws")["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    counts = {"prefill": 2, "decode": 2, "router": 2}
    for pool, wants in wanted().items():
        offers, nodes = types[pool]["resources"], types[pool]["min_workers"]
        held = min(int(offers.get(name, 0) / amount) for name, amount in wants.items() if amount)
        assert held * nodes >= counts[pool], pool
        assert types[pool]["labels"]["baton.dev/pool"] == pool
    assert set(types) == POOLS | {"head"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_nodes_start_by_the_script_that_hardens_the_front(name: str) -> None:
    made = template(name)
    for commands in (made["head_start_ray_commands"], made["worker_start_ray_commands"]):
        (start,) = (line for line in commands if "ray start" in line)
        assert "/bin/ray-node ray start" in start
        assert "--block" not in start  # `ray up` would wait for ever
    assert "--num-cpus=0" in made["head_start_ray_commands"][-1]
    for local in made["file_mounts"].values():
        assert (ROOT / local).exists() or local == "secrets", local


def test_the_head_s_and_workers_address_agree() -> None:
    for name in TEMPLATES:
        made = template(name)
        assert "--port=6379" in made["head_start_ray_commands"][-1]
        assert "--address=$RAY_HEAD_IP:6379" in made["worker_start_ray_commands"][-1]
