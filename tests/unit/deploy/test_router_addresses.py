"""Where a router finds its siblings: by loopback on its own node, for the ingress may listen nowhere else."""

from __future__ import annotations

from ray.serve._private.common import DeploymentID, DeploymentTargetInfo, ReplicaID, RunningReplicaInfo

from deploy.discovery import http_addresses


def replica(name: str, address: str, port: int | None) -> RunningReplicaInfo:
    return RunningReplicaInfo(
        replica_id=ReplicaID(name, DeploymentID("router", "baton")),
        node_id=address, node_ip=address, availability_zone=None, actor_name=name, max_ongoing_requests=1,
        backend_http_port=port,
    )  # fmt: skip


def test_siblings_here_are_reached_by_loopback_and_others_by_their_node() -> None:
    running = [replica("a", "10.0.0.1", 30000), replica("b", "10.0.0.1", 30001), replica("c", "10.0.0.2", 30000)]
    running += [replica("d", "fd00::2", 30000), replica("starting", "10.0.0.2", None)]
    targets = DeploymentTargetInfo(is_available=True, running_replicas=running)
    assert http_addresses(targets, "10.0.0.1") == {
        "a": "127.0.0.1:30000", "b": "127.0.0.1:30001", "c": "10.0.0.2:30000", "d": "[fd00::2]:30000"
    }  # fmt: skip
