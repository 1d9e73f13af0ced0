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
from ray.serve._private.common import DeploymentID, DeploymentTargetInfo
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.long_poll import LongPollClient, LongPollNamespace

from router.peers import Pools, Role, WorkerAddress

log = logging.getLogger(__name__)


class Directory:
    """Keeps ``pools`` in step with the running replicas of application ``app_name`` until closed."""

    def __init__(self, pools: Pools, app_name: str, roles: tuple[Role, ...]) -> None:
        self._pools = pools
        self._client = LongPollClient(
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE),
            {
                (LongPollNamespace.DEPLOYMENT_TARGETS, DeploymentID(role, app_name)): self._listener(role)
                for role in roles
            },
            call_in_event_loop=asyncio.get_running_loop(),
            client_id=f"baton-router:{ray.get_runtime_context().get_actor_id()}",
        )

    def close(self) -> None:
        self._client.stop()

    def _listener(self, role: Role) -> Any:
        def changed(targets: DeploymentTargetInfo) -> None:
            self._pools.update(role, addresses(role, targets))

        return changed


def addresses(role: Role, targets: DeploymentTargetInfo) -> list[WorkerAddress]:
    """The workers among ``targets`` that have published where they listen."""
    published = (replica.replica_metadata for replica in targets.running_replicas)
    return [
        WorkerAddress(role, data["worker_id"], data["host"], int(data["port"]), data["generation"])
        for data in published
        if data.get("role") == role
    ]
