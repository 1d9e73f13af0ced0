"""Empties the node it runs on: Serve starts successors elsewhere, then this node's replicas end or hand on their work.

``python -m deploy.drain`` is what a pod runs before it ends (preStop), and an operator before a host is switched off.
It returns when no replica is left here, or at the deadline with exit code 1, also where Ray does not answer.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time

POLL_S = 0.5
REPORT_S = 1.0  # of the deadline, to ask what is left and to leave


def main() -> int:
    parser = argparse.ArgumentParser(description="Empty a node of Ray of its replicas.")
    parser.add_argument("--address", default="auto", help="Ray's address; auto finds the one of this node")
    parser.add_argument("--node-id", default="", help="the node, by Ray's id; this one unless given")
    parser.add_argument("--deadline-s", type=int, default=120, help="how long it may take")
    arguments = parser.parse_args()
    end_s = time.monotonic() + arguments.deadline_s
    last = threading.Timer(arguments.deadline_s, _give_up, [arguments.deadline_s])
    last.daemon = True
    last.start()
    import ray

    ray.init(address=arguments.address, namespace="serve", log_to_driver=False)
    try:
        node_id = arguments.node_id or ray.get_runtime_context().get_node_id()
        return drain(node_id, end_s - REPORT_S)
    finally:
        ray.shutdown()


def _give_up(deadline_s: int) -> None:
    """Ends the process: Ray's calls wait for a head that is gone for minutes, and cannot be told not to."""
    print(f"not empty after {deadline_s} s: Ray does not answer", file=sys.stderr, flush=True)
    os._exit(1)


def drain(node_id: str, end_s: float) -> int:
    """Has Ray's state say that the node will go, and waits for Serve to leave it until ``end_s`` (monotonic).

    0 done, 1 not in time or refused.
    """
    import ray
    from ray.core.generated import autoscaler_pb2

    deadline_s = max(0.0, end_s - time.monotonic())
    gcs = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, refusal = gcs.drain_node(
        node_id,
        autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,  # the one that Serve prepares for
        "the node will go",
        int(1000 * (time.time() + deadline_s)),
    )
    if not accepted:
        print(f"Ray refuses to drain {node_id}: {refusal}", file=sys.stderr)
        return 1
    left = replicas_on(node_id)
    while left and time.monotonic() < end_s:
        time.sleep(POLL_S)
        left = replicas_on(node_id)
    for replica in left:
        print(f"still here after {deadline_s:.0f} s: {replica}", file=sys.stderr)
    return int(bool(left))


def replicas_on(node_id: str) -> list[str]:
    """Replicas of every application that are on the node, whatever their state."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return []
    return [
        f"{name}/{replica['replica_id']} ({replica['state']})"
        for app in client.get_serve_details()["applications"].values()
        for name, deployment in app["deployments"].items()
        for replica in deployment["replicas"]
        if replica.get("node_id") == node_id  # one that starts has none yet
    ]


if __name__ == "__main__":
    sys.exit(main())
