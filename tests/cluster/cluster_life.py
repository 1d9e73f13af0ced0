"""Run inside namespaces of its own: the Serve config that the RayService of overlay dev carries, on three raylets.

A cluster's life under load: deployed with `serve deploy`, asked by clients that know no file of ours, a node drained, a
node killed, the configuration changed. Prints one JSON line. Started by ``test_cluster_life.py``; not a test itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import yaml

from baton.config import parse
from baton.wire import inference_pb2 as pb
from baton.wire import inference_pb2_grpc
from deploy.serve_config import environment as environment_of_clusters
from deploy.serve_config import serve_config
from deploy.supervisor import environment, scratch_folder

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / "deploy" / "kuberay" / "overlays" / "dev" / "serve.yaml"
DASHBOARD = "http://127.0.0.1:8265"
GRPC, HTTP = "127.0.0.1:9000", "http://127.0.0.1:8000"
PROMPT = list(range(1000, 1200))
TOKENS = 24
STREAMS = 2
READY_S = 120.0


def main() -> None:
    if os.getpid() < 100:  # a PID namespace of our own, so the network one is ours too
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    scratch = scratch_folder()
    tree = overridden(yaml.safe_load(CARRIED.read_text(encoding="utf-8")), scratch, cache_dir=sys.argv[1])
    (scratch / "ray").mkdir()
    config = parse(tree["applications"][0]["args"])
    os.environ.update(
        environment(config, scratch) | environment_of_clusters(config)
    )  # as a cluster has it, files apart
    os.environ.update(RAY_TMPDIR=str(scratch / "ray"), PYTHONPATH=str(ROOT))
    try:
        print(json.dumps(live(tree, scratch)), flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def overridden(tree: dict[str, Any], scratch: Path, *, cache_dir: str) -> dict[str, Any]:
    """What this machine needs otherwise: paths, exact arithmetic, one thread, one proxy for nodes that share ports."""
    args = tree["applications"][0]["args"]
    key = scratch / "cluster-key"
    key.write_text(secrets.token_urlsafe(48), encoding="utf-8")
    key.chmod(0o600)
    args["model"] = {"cache_dir": cache_dir, "dtype": "float32"}
    args["security"]["cluster_key_file"] = str(key)
    args["prefill"]["threads"] = args["decode"]["threads"] = 1
    changed = serve_config(parse(args))
    assert changed["applications"][0]["deployments"] == tree["applications"][0]["deployments"]
    return {**tree, "proxy_location": "HeadOnly"}


def live(tree: dict[str, Any], scratch: Path) -> dict[str, Any]:
    import ray
    from ray.cluster_utils import Cluster

    common = {"object_store_memory": 80 << 20}
    head = {"node_ip_address": "127.0.0.1", "num_cpus": 1, "resources": {"router": 2}, "dashboard_port": 8265}
    cluster = Cluster(initialize_head=True, head_node_args={**head, **common, "include_dashboard": True})

    def add(host: str, **resources: float) -> Any:
        return cluster.add_node(
            node_ip_address=host, num_cpus=4, resources=resources, include_dashboard=False, **common
        )

    first_prefill, first_decode = add("127.0.0.2", prefill=1), add("127.0.0.3", decode=1)
    ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
    found: dict[str, Any] = {}
    try:
        deploy(tree, scratch)
        wait_for(prefill=["127.0.0.2"], decode=["127.0.0.3"])
        found["reflected"], found["openai"] = ask_by_reflection(), ask_by_openai()
        with Load() as load:
            note(load, "drain")
            add("127.0.0.4", decode=2)
            found["drain"] = drained(cluster.address, first_decode)
            wait_for(prefill=["127.0.0.2"], decode=["127.0.0.4"])
            cluster.remove_node(first_decode)
            found["after_drain"] = load.count()
            note(load, "kill")
            cluster.remove_node(first_prefill, allow_graceful=False)
            add("127.0.0.5", prefill=2)
            wait_for(prefill=["127.0.0.5"], decode=["127.0.0.4"])
            found["after_kill"] = load.count()
            note(load, "upgrade")
            before = workers()
            tree["applications"][0]["args"]["prefill"]["step_tokens"] = 128
            deploy(tree, scratch)
            wait_for(prefill=["127.0.0.5"], decode=["127.0.0.4"], none_of=before)
            time.sleep(2.0)
            found["after_upgrade"] = load.count()
            note(load, "scale")
            before, began_s = workers(), time.monotonic()
            (decode,) = (one for one in tree["applications"][0]["deployments"] if one["name"] == "decode")
            decode["num_replicas"] = 2
            deploy(tree, scratch)
            wait_for(prefill=["127.0.0.5"], decode=["127.0.0.4", "127.0.0.4"])
            found["stayed"], found["scale_s"] = before <= workers(), time.monotonic() - began_s
        found["failures"], found["answers"] = load.failures, sorted({tuple(answer) for answer in load.answers})
        return found
    finally:
        ray.shutdown()
        cluster.shutdown()


def note(load: Load, stage: str) -> None:
    load.stage = stage
    print(f"{time.strftime('%X')} {stage}", file=sys.stderr, flush=True)


def deploy(tree: dict[str, Any], scratch: Path) -> None:
    """`serve deploy`, as an operator has it."""
    file = scratch / "serve.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    serve = Path(sys.executable).with_name("serve")
    subprocess.run([str(serve), "deploy", str(file), "--address", DASHBOARD], check=True, stdout=sys.stderr)


def drained(address: str, node: Any) -> int:
    command = [sys.executable, "-m", "deploy.drain", "--address", address, "--node-id", node.node_id]
    return subprocess.run([*command, "--deadline-s", "90"], check=False, stdout=sys.stderr).returncode


def status() -> pb.GetStatusResponse:
    with grpc.insecure_channel(GRPC) as channel:
        return inference_pb2_grpc.InferenceStub(channel).GetStatus(pb.GetStatusRequest(), timeout=5)


def workers() -> set[str]:
    return {worker.id for pool in status().pools for worker in pool.workers}


def wait_for(*, none_of: set[str] = frozenset(), **hosts: list[str]) -> None:  # type: ignore[assignment]
    """Returns when exactly the workers of these hosts are ready, and none of the given ones is left."""
    deadline_s, seen = time.monotonic() + READY_S, None
    while time.monotonic() < deadline_s:
        with contextlib.suppress(grpc.RpcError):
            known = [(pool.role, worker) for pool in status().pools for worker in pool.workers]
            seen = {role: sorted(w.address.rpartition(":")[0] for r, w in known if r == role) for role in hosts}
            ready = all(worker.state == pb.WORKER_STATE_READY for _, worker in known)
            if ready and seen == hosts and none_of.isdisjoint(worker.id for _, worker in known):
                return
        time.sleep(0.2)
    raise TimeoutError(f"workers are at {seen}, not at {hosts}")


def ask_by_reflection() -> str:
    from grpc_requests import Client

    request = {"prompt": "The capital of France is", "sampling": {"temperature": 0.0, "max_tokens": 8}}
    parts = Client.get_by_endpoint(GRPC).service("baton.v1.Inference").Generate(request)
    return "".join(part.get("text", "") for part in parts)


def ask_by_openai() -> str:
    from openai import OpenAI

    client = OpenAI(base_url=f"{HTTP}/v1", api_key="none")
    model = client.models.list().data[0].id
    done = client.completions.create(model=model, prompt="The capital of France is", temperature=0.0, max_tokens=8)
    return str(done.choices[0].text)


class Load:
    """Streams one after the other on a few threads, without retries of their own, until it is left."""

    def __init__(self) -> None:
        self.answers: list[list[int]] = []
        self.failures: list[tuple[str, str]] = []  # when, why
        self.stage = ""
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(STREAMS)]

    def count(self) -> int:
        return len(self.answers)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        with grpc.insecure_channel(GRPC) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            while not self._over.is_set():
                try:
                    self.answers.append(list(self._stream(stub)))
                except grpc.RpcError as error:
                    self.failures.append((self.stage, f"{error.code().name}: {error.details()}"))
                    time.sleep(0.2)

    def _stream(self, stub: inference_pb2_grpc.InferenceStub) -> Iterator[int]:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=PROMPT),
            sampling=pb.Sampling(temperature=0.0, max_tokens=TOKENS, ignore_eos=True),
        )
        for part in stub.Generate(request, timeout=60):
            yield from part.token_ids


if __name__ == "__main__":
    main()
