"""Run inside namespaces of its own: three raylets on 127.0.0.1, .2 and .3, the application across them, one question.

Prints one JSON line with the workers' hosts and the answer. Started by ``test_three_nodes.py``; not a test itself.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys

import grpc

from baton.config import parse
from baton.wire import inference_pb2 as pb
from baton.wire import inference_pb2_grpc
from deploy.serve_config import serve_config
from deploy.supervisor import environment, scratch_folder, start_serve

READY_TIMEOUT_S = 120.0


def main() -> None:
    cache_dir, prompt_ids = sys.argv[1], json.loads(sys.argv[2])
    if os.getpid() < 100:  # a PID namespace of our own, so the network one is ours too
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    config = parse(
        {
            "name": "three-nodes",
            "model": {"cache_dir": cache_dir, "dtype": "float32"},
            "prefill": {"kv_tokens": 4096, "resources": {"prefill": 1}},
            "decode": {"kv_tokens": 4096, "resources": {"decode": 1}, "page_tokens": 32},
            "ingress": {"grpc_port": 19000, "http_port": 18000},
        }
    )
    scratch = scratch_folder()
    ray_folder = scratch / "ray"
    ray_folder.mkdir()
    os.environ.update(environment(config, scratch), RAY_TMPDIR=str(ray_folder), BATON_CLUSTER_KEY=secrets.token_hex(32))

    import ray
    from ray.cluster_utils import Cluster

    common = {"object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"node_ip_address": "127.0.0.1", "num_cpus": 4, **common},
    )
    for address, role in (("127.0.0.2", "prefill"), ("127.0.0.3", "decode")):
        cluster.add_node(node_ip_address=address, num_cpus=2, resources={role: 1}, **common)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        start_serve(serve_config(config) | {"proxy_location": "HeadOnly"})  # three proxies would share one port
        print(json.dumps(ask(prompt_ids)), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(scratch, ignore_errors=True)


def ask(prompt_ids: list[int]) -> dict[str, object]:
    with grpc.insecure_channel("127.0.0.1:19000") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt_ids),
            sampling=pb.Sampling(temperature=0.0, max_tokens=32, ignore_eos=True),
        )
        chunks = list(stub.Generate(request, timeout=60, wait_for_ready=True))
        status = stub.GetStatus(pb.GetStatusRequest(), timeout=10)
    return {
        "tokens": [token for chunk in chunks for token in chunk.token_ids],
        "transport": chunks[-1].ledger.transport,
        "hosts": {pool.role: [w.address.rpartition(":")[0] for w in pool.workers] for pool in status.pools},
    }


if __name__ == "__main__":
    main()
