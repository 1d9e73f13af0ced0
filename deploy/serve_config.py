"""What Ray Serve is told: one application for every way to run it (a local cluster, a Ray cluster, KubeRay).

Pure: from Baton's configuration to the mapping that ``serve deploy`` takes (``ray.serve.schema.ServeDeploySchema``).
:func:`deploy.app.build` gives its deployments the very options that :func:`deployments` lists, so a local cluster and a
YAML file cannot drift apart. Which node a replica goes to, and why no placement group is needed: ADR 14.
"""

from __future__ import annotations

import math
from typing import Any

from baton.config import Config, PoolConfig

IMPORT_PATH = "deploy.app:build"
SERVICER_FUNCTIONS = (
    "router.handlers.add_inference_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)
SCALING_POLICY = "deploy.scaling.LoadPolicy"
ONLY_SERVES = ("min_replicas", "max_replicas", "target_load", "surge_percent")  # keys of a pool

ROUTER_CPUS = 0.1
# gRPC's own threads stay out of a router's streams: HAProxy answers every message with two frames, and threads that
# wake up to read these cost a fifth of the router (ADR 20). A gRPC that does not know the names logs a line, no more.
ROUTER_ENVIRONMENT = {"GRPC_EXPERIMENTS": "-event_engine_listener,-event_engine_for_all_other_endpoints"}
HEALTH_CHECK_S = 2.0
GRACE_S = 5.0  # between the end of a drain and the end of the process
MIN_MESSAGE_BYTES = 4 << 20  # the limit holds for answers too
LOOK_BACK_S = 30.0
UPSCALE_DELAY_S = 15.0
DOWNSCALE_DELAY_S = 300.0  # a worker's start takes minutes where the model is large


def serve_config(config: Config) -> dict[str, Any]:
    """The mapping for ``serve deploy``: ingress and the one application."""
    return {
        "proxy_location": "EveryNode",  # every node with a replica: KubeRay asks each pod's proxy whether it is ready
        "http_options": {"host": config.ingress.host, "port": config.ingress.http_port},
        "grpc_options": {
            "port": config.ingress.grpc_port,
            "grpc_servicer_functions": list(SERVICER_FUNCTIONS),
            "enable_reflection": True,
        },
        "applications": [application(config)],
    }


def application(config: Config) -> dict[str, Any]:
    """The application, as :func:`arguments` and :func:`deployments` have it."""
    return {
        "name": config.name,
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": arguments(config),
        "deployments": deployments(config),
    }


def arguments(config: Config) -> dict[str, Any]:
    """What replicas are told: the keys of ``config`` that differ from the defaults and that they act on.

    Numbers that only Serve acts on stay out, for Serve restarts every replica when an argument changes (ADR 14).
    """
    tree = config.model_dump(exclude_defaults=True)
    pools = {"prefill": config.prefill, "decode": config.decode}
    shared = any(pool.replicas and not pool.threads for pool in pools.values())  # the cores, by the number of workers
    for role, pool in pools.items():
        left_out = ONLY_SERVES if shared or not pool.replicas else (*ONLY_SERVES, "replicas")
        tree[role] = {key: value for key, value in tree.get(role, {}).items() if key not in left_out}
    tree["router"] = {key: value for key, value in tree.get("router", {}).items() if key != "replicas"}
    return {key: value for key, value in tree.items() if value != {}}


def deployments(config: Config) -> list[dict[str, Any]]:
    """Options of every deployment, by Serve's names: the pools that have workers, then the router."""
    pools = [("prefill", config.prefill), ("decode", config.decode)]
    return [*(_pool(role, pool) for role, pool in pools if pool.replicas), _router(config)]


def environment(config: Config) -> dict[str, str]:
    """What Ray's and Serve's processes on every node must find in their environment; most is read once, at import."""
    streams = str(2 * config.router.max_inflight)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # Every reload leaves the streams of before to the old process: it must live as long as the longest of them.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(config.router.deadline_s)),
        "RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS": streams,
        "RAY_SERVE_HAPROXY_H2_BE_MAX_CONCURRENT_STREAMS": streams,
        # A router that ends takes requests until every node's front has learnt to send them elsewhere.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        # A little more than is accepted, so that what is a little too large gets a proper answer. Ray's is 2 GiB.
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(max(config.router.max_request_bytes, MIN_MESSAGE_BYTES) + (64 << 10)),
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_worker_niceness": "0",  # Ray makes its workers yield to every other process by default
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _router(config: Config) -> dict[str, Any]:
    router = config.router
    return {
        "name": "router",
        "num_replicas": router.replicas,
        "max_ongoing_requests": 2 * router.max_inflight,  # the router refuses before Serve would queue
        "max_queued_requests": router.max_inflight,  # and what queues all the same is bounded; Serve's default is not
        "ray_actor_options": {
            "num_cpus": ROUTER_CPUS,
            "resources": router.resources,
            "runtime_env": {"env_vars": ROUTER_ENVIRONMENT},
        },
        "health_check_period_s": HEALTH_CHECK_S,
        "graceful_shutdown_timeout_s": router.drain_s + GRACE_S,
        "max_surge_percent": 100,
    }


def _pool(role: str, pool: PoolConfig) -> dict[str, Any]:
    ranks = pool.tensor_parallel
    # One actor stands for all its ranks, which are its child processes: they are placed together or not at all.
    actor: dict[str, Any] = {
        "num_cpus": pool.cpus * ranks,
        "resources": {name: amount * ranks for name, amount in pool.resources.items()},
    }
    if pool.gpus:
        actor["num_gpus"] = pool.gpus * ranks
    return {
        "name": role,
        **_replicas(pool),
        "ray_actor_options": actor,
        "health_check_period_s": HEALTH_CHECK_S,
        "graceful_shutdown_timeout_s": pool.drain_s + GRACE_S,
        "max_surge_percent": pool.surge_percent,
    }


def _replicas(pool: PoolConfig) -> dict[str, Any]:
    if not pool.max_replicas:
        return {"num_replicas": pool.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": pool.min_replicas,
            "initial_replicas": pool.replicas,
            "max_replicas": pool.max_replicas,
            "look_back_period_s": LOOK_BACK_S,
            "upscale_delay_s": UPSCALE_DELAY_S,
            "downscale_delay_s": DOWNSCALE_DELAY_S,
            "policy": {"policy_function": SCALING_POLICY, "policy_kwargs": {"target": pool.target_load}},
        }
    }
