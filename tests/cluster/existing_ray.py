"""Run inside namespaces of its own: three raylets on 127.0.0.1, .2 and .3, `baton up --address` across them, questions.

Prints one JSON line with the workers' hosts, the answer and what the commands said. Started by
``test_existing_ray.py``; not a test itself.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from three_nodes import ask  # beside this script, as Python finds it when that is run

from baton.config import parse
from deploy.serve_config import environment as environment_of_clusters
from deploy.serve_config import serve_config
from deploy.supervisor import environment, scratch_folder

COMMAND_S = 150.0


def main() -> None:
    cache_dir, prompt_ids = sys.argv[1], json.loads(sys.argv[2])
    if os.getpid() < 100:  # a PID namespace of our own, so the network one is ours too
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    tree = {
        "name": "three-nodes",
        "model": {"cache_dir": cache_dir, "dtype": "float32"},
        "prefill": {"kv_tokens": 4096, "resources": {"prefill": 1}},
        "decode": {"kv_tokens": 4096, "resources": {"decode": 1}, "page_tokens": 32},
        "ingress": {"grpc_port": 19000, "http_port": 18000},
    }
    config, scratch = parse(tree), scratch_folder()
    file = scratch / "baton.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    ray_folder = scratch / "ray"
    ray_folder.mkdir()
    os.environ.update(environment(config, scratch) | environment_of_clusters(config))  # a cluster's, files apart
    os.environ.update(RAY_TMPDIR=str(ray_folder), BATON_CLUSTER_KEY=secrets.token_hex(32))

    from ray.cluster_utils import Cluster

    common = {"object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"node_ip_address": "127.0.0.1", "num_cpus": 4, **common},
    )
    for address, role in (("127.0.0.2", "prefill"), ("127.0.0.3", "decode")):
        cluster.add_node(node_ip_address=address, num_cpus=2, resources={role: 1}, **common)
    try:
        print(json.dumps(lived(cluster.address, file, serve_config(config), prompt_ids)), flush=True)
    finally:
        cluster.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def lived(address: str, file: Path, tree: dict[str, Any], prompt_ids: list[int]) -> dict[str, object]:
    """One life of the application on a Ray and a Serve that run already: up, asked, down."""
    import ray

    ray.init(address=address, namespace="serve", log_to_driver=False)
    start_ingress(tree)
    ray.shutdown()
    up = baton("up", "--address", address, "--config", str(file))
    if up.returncode != 0:
        raise RuntimeError(up.stderr)
    answer = ask(prompt_ids)
    down = baton("down", "--name", "three-nodes", "--address", address)
    return {**answer, "endpoints": up.stdout.splitlines(), "down": [down.returncode, down.stderr.splitlines()[-1]]}


def start_ingress(tree: dict[str, Any]) -> None:
    """A Serve that runs already; on the head alone, for three proxies would share one port here."""
    from ray import serve
    from ray.serve.config import HTTPOptions, gRPCOptions

    serve.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(**tree["http_options"]),
        grpc_options=gRPCOptions(**tree["grpc_options"]),
    )


def baton(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)


if __name__ == "__main__":
    main()
