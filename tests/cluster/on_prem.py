"""Run inside namespaces of its own: the four machines of ``deploy/ray/on-prem.yaml``, started by its own commands.

Each machine is a network and a PID namespace with the address that the template gives it, on one bridge. What `ray up`
would do there is done here: files are mounted, then the template's start commands run. Then `serve deploy` on the head,
of an application for machines without GPUs, and one request to the ingress of each machine. Prints one JSON line.
Started by ``test_on_prem.py``; not a test itself.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.util import prepare_config

from baton.config import parse
from deploy.serve_config import serve_config
from deploy.supervisor import scratch_folder

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "deploy" / "ray" / "on-prem.yaml"
POOLS = ({"router": 1}, {"prefill": 1}, {"decode": 1})
GATEWAY = "10.0.0.254"
COMMAND_S, READY_S = 90.0, 120.0
PROMPT = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}


@dataclass(frozen=True)
class Machine:
    """One host of the template: its namespaces are those of a process that only waits."""

    address: str
    home: Path
    waits: int
    environment: Mapping[str, str]

    def run(self, command: str) -> None:
        """``command`` in a shell of this machine; raises CalledProcessError."""
        inside = ["nsenter", "--target", str(self.waits), "--net", "--pid", "--mount", "bash", "-c", command]
        subprocess.run(inside, env=self.environment, stdout=sys.stderr, check=True, timeout=COMMAND_S, cwd=self.home)


def main() -> None:
    scratch, template = scratch_folder(), yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    try:
        print(json.dumps(lived(scratch, template, cache_dir=sys.argv[1])), flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def lived(scratch: Path, template: dict[str, Any], *, cache_dir: str) -> dict[str, Any]:
    provider = template["provider"]
    addresses = [provider["head_ip"], *provider["worker_ips"]]
    bridge()
    machines = [
        machine(number, address, scratch / f"m{number}", head=provider["head_ip"])
        for number, address in enumerate(addresses)
    ]
    for one, pool in zip(machines, ({}, *POOLS), strict=True):
        mount(one.home, template, pool, scratch, cache_dir)
    head, *workers = machines
    for command in template["head_start_ray_commands"]:
        head.run(here(command, head))
    for worker in workers:
        for command in template["worker_start_ray_commands"]:
            worker.run(here(command, worker))
    head.run("for _ in $(seq 60); do if ~/baton/bin/ready head; then exit 0; fi; sleep 1; done; exit 1")
    head.run("~/baton/venv/bin/serve deploy ~/baton/app/serve.yaml")
    asked = {one.address: ask(one.address) for one in machines}
    return {"answers": asked, "workers": status(head)}


def bridge() -> None:
    for command in ("link set lo up", "link add br0 type bridge", f"addr add {GATEWAY}/24 dev br0", "link set br0 up"):
        ip(command)


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


def machine(number: int, address: str, home: Path, *, head: str) -> Machine:
    """A host with that address, and nothing on it yet."""
    home.mkdir()
    unshare = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child", "sleep", "infinity"]
    outer = subprocess.Popen(unshare)
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    deadline_s = time.monotonic() + 10.0
    while not children.read_text().strip():
        assert time.monotonic() < deadline_s, "unshare did not start"
        time.sleep(0.05)
    waits = int(children.read_text())
    ip(f"link add v{number} type veth peer name eth0 netns {waits}")
    ip(f"link set v{number} master br0 up")
    front = home / "h"  # one file system here: what lies in /tmp on a real machine, apart
    front.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "RAY_HEAD_IP": head,
        "RAY_TMPDIR": str(home / "t"),
        "BATON_FRONT_DIR": str(home / "f"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(front / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(front / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(front),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(front / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(front / "metrics.sock"),
    }
    (home / "t").mkdir()
    made = Machine(address, home, waits, environment)
    made.run(
        f"ip link set lo up; ip addr add {address}/24 dev eth0; ip link set eth0 up; ip route add default via {GATEWAY}"
    )
    return made


def mount(home: Path, template: dict[str, Any], pool: dict[str, int], scratch: Path, cache_dir: str) -> None:
    """What `ray up` copies, and what the template wants to find: Baton, the pool, the key."""
    (home / "baton").mkdir()
    (home / "baton" / "venv").symlink_to(sys.prefix)
    for target, source in template["file_mounts"].items():
        shutil.copytree(ROOT / source, home / target.removeprefix("~/"))
    (home / "pool").write_text(json.dumps(pool), encoding="utf-8")
    key = scratch / "cluster-key"
    if not key.exists():
        key.write_text(secrets.token_urlsafe(48), encoding="utf-8")
        key.chmod(0o600)
    worker = {"threads": 1, "kv_tokens": 4096}
    tree = {
        "model": {"cache_dir": cache_dir, "dtype": "float32"},
        "prefill": {**worker, "resources": {"prefill": 1}},
        "decode": {**worker, "resources": {"decode": 1}},
        "handoff": {"transport": "tcp"},
        "router": {"resources": {"router": 1}},
        "security": {"cluster_key_file": str(key), "allow_anonymous": True},
        "ingress": {"host": "0.0.0.0"},
    }
    app = home / "baton" / "app"
    (app / "baton.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    (app / "serve.yaml").write_text(yaml.safe_dump(serve_config(parse(tree))), encoding="utf-8")
    (home / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(prepare_config(template)), encoding="utf-8")


def here(command: str, machine: Machine) -> str:
    """The template's command, with this machine's file in place of the one that all would share."""
    return command.replace("/etc/baton/pool", shlex.quote(str(machine.home / "pool")))


def ask(address: str) -> str:
    """By the machine's own ingress, as soon as it serves."""
    deadline_s, wait_s = time.monotonic() + READY_S, 0.5
    request = urllib.request.Request(
        f"http://{address}:8000/v1/completions",
        data=json.dumps(PROMPT).encode(),
        headers={"content-type": "application/json"},
    )
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return str(json.load(answer)["choices"][0]["text"])
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{address} does not serve: {error}") from error
            time.sleep(wait_s)


def status(head: Machine) -> dict[str, list[str]]:
    """Where the workers are, by pool."""
    import grpc

    from baton.wire import inference_pb2 as pb
    from baton.wire import inference_pb2_grpc

    with grpc.insecure_channel(f"{head.address}:9000") as channel:
        told = inference_pb2_grpc.InferenceStub(channel).GetStatus(pb.GetStatusRequest(), timeout=10)
    return {pool.role: [worker.address.rpartition(":")[0] for worker in pool.workers] for pool in told.pools}


if __name__ == "__main__":
    main()
