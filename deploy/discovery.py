"""From Serve's replicas to the router's pools: who runs where, as the controller tells it.

Workers publish address and generation through ``record_replica_metadata``; Serve's controller pushes each change of
a deployment's running replicas by long poll. The long-poll client is Serve's own (the same that its handles use), and
this is the one place that touches it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray._common.network_utils import get_localhost_ip
from ray.serve._private.common import DeploymentID, DeploymentTargetInfo, ReplicaID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.long_poll import LongPollClient, LongPollNamespace

from router.peers import Role, WorkerAddress
from router.service import InferenceService

log = logging.getLogger(__name__)


class Directory:
    """Keeps ``service`` in step with the running replicas of the router ``own``'s application until closed.

    Of the workers its pools are told, of the routers its siblings; its health, whether ``own`` is still among them:
    Serve tells a replica itself that it must go only when its calls have ended.
    """

    def __init__(self, service: InferenceService, own: ReplicaID, roles: tuple[Role, ...]) -> None:
        self._pools, here = service.pools, ray.util.get_node_ip_address()

        def routers(targets: DeploymentTargetInfo) -> None:
            service.health.listed(any(replica.replica_id == own for replica in targets.running_replicas))
            service.siblings.update(http_addresses(targets, here))

        app_name = own.deployment_id.app_name
        listeners = {DeploymentID(role, app_name): self._listener(role) for role in roles}
        listeners[own.deployment_id] = routers
        self._client = LongPollClient(
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE),
            {(LongPollNamespace.DEPLOYMENT_TARGETS, name): listener for name, listener in listeners.items()},
            call_in_event_loop=asyncio.get_running_loop(),
            client_id=f"baton-router:{ray.get_runtime_context().get_actor_id()}",
        )

    def close(self) -> None:
        self._client.stop()

    def _listener(self, role: Role) -> Any:
        def changed(targets: DeploymentTargetInfo) -> None:
            self._pools.update(role, addresses(role, targets))

        return changed


def http_addresses(targets: DeploymentTargetInfo, here: str) -> dict[str, str]:
    """Where each of the routers among ``targets`` serves HTTP itself, past the ingress, by its id.

    Those on this node, ``here``, by loopback, as HAProxy reaches them: it may be all that they listen on.
    """
    found = {}
    for replica in targets.running_replicas:
        if replica.node_ip and replica.backend_http_port:
            address = get_localhost_ip() if replica.node_ip == here else replica.node_ip
            host = f"[{address}]" if ":" in address else address
            found[replica.replica_id.unique_id] = f"{host}:{replica.backend_http_port}"
    return found


def addresses(role: Role, targets: DeploymentTargetInfo) -> list[WorkerAddress]:
    """The workers among ``targets`` that have published where they listen."""
    published = (replica.replica_metadata for replica in targets.running_replicas)
    return [
        WorkerAddress(role, data["worker_id"], data["host"], int(data["port"]), data["generation"])
        for data in published
        if data.get("role") == role
    ]
