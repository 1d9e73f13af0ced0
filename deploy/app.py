"""The Serve application: one ingress deployment (the router) and two pools of workers behind it.

Serve owns life cycle, health and the ingress ports; neither tokens between workers nor KV pass through it
(docs/adr/0002). ``build`` is the import path of every deployment form: local, Ray cluster and KubeRay.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from grpc_health.v1 import health_pb2
from ray import serve
from ray.serve import Application
from ray.serve.grpc_util import RayServegRPCContext
from starlette.types import ASGIApp

from baton import logs
from baton.api_keys import Caller
from baton.config import Config, PoolConfig, parse
from baton.errors import BatonError, ConfigError
from baton.secure import require_key
from baton.tasks import on_own_thread
from baton.wire import inference_pb2
from decode_worker.worker import DecodeWorker
from deploy.discovery import Directory
from deploy.scaling import LOAD, decode_load, prefill_load
from deploy.serve_config import deployments
from engine import affinity, hub
from engine.build import load_model, start_ranks
from engine.model import Model
from engine.ranks import Ranks
from prefill_worker.worker import PrefillWorker
from router import status
from router.openai.app import build as build_http
from router.peers import Role
from router.service import InferenceService

T = TypeVar("T")
log = logging.getLogger(__name__)


def build(args: dict[str, Any]) -> Application:
    """The application for the configuration tree ``args``, with the options that follow from it alone.

    Raises ConfigError for a bad one. Serve puts the options that its config file lists in place of these.
    """
    return assemble(args, deployments(parse(args)))


def assemble(args: dict[str, Any], options: Sequence[Mapping[str, Any]]) -> Application:
    """As :func:`build`, with ``options`` of the deployments: those of :func:`deploy.serve_config.deployments`."""
    config = parse(args)
    if config.handoff.transport == "loopback" and config.prefill.replicas:
        raise ConfigError("loopback joins workers of one process only; use nixl or tcp", field="handoff.transport")
    tree = config.model_dump()
    # gRPC methods and the HTTP application of one class, in one process
    classes = {"prefill": PrefillReplica, "decode": DecodeReplica, "router": serve.ingress()(RouterReplica)}
    *pools, router = (serve.deployment(classes[one["name"]], **one) for one in options)
    return router.bind(tree, [pool.bind(tree) for pool in pools])


class RouterReplica:
    """The ingress: Serve calls the methods below by their gRPC names; all sense lives in ``router.service``."""

    async def __init__(self, tree: dict[str, Any], pools: list[Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        config = parse(tree)
        logs.configure(config.observe, f"router {serve.get_replica_context().replica_id.unique_id}")
        require_key(config.security)
        folder = await asyncio.to_thread(_folder, config)
        context = serve.get_replica_context()
        self._service = InferenceService(config, folder, router_id=context.replica_id.unique_id)
        roles: tuple[Role, ...] = ("prefill", "decode") if config.prefill.replicas else ("decode",)
        self._directory = Directory(self._service, context.replica_id, roles)

    async def __del__(self) -> None:
        """Serve awaits it when this replica must go and its calls have ended: the last spans leave with it."""
        self._directory.close()
        await self._service.close()

    async def Generate(  # noqa: N802 - gRPC's name
        self, request: bytes, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        async for response in self._service.generate(request, grpc_context):
            yield response

    async def Tokenize(  # noqa: N802
        self, request: bytes, grpc_context: RayServegRPCContext
    ) -> inference_pb2.TokenizeResponse:
        return await self._answer(
            lambda caller: self._service.tokenize(request, caller), inference_pb2.TokenizeResponse(), grpc_context
        )

    async def Detokenize(  # noqa: N802
        self, request: bytes, grpc_context: RayServegRPCContext
    ) -> inference_pb2.DetokenizeResponse:
        return await self._answer(
            lambda caller: self._service.detokenize(request, caller), inference_pb2.DetokenizeResponse(), grpc_context
        )

    async def ListModels(  # noqa: N802
        self, request: bytes, grpc_context: RayServegRPCContext
    ) -> inference_pb2.ListModelsResponse:
        empty = inference_pb2.ListModelsResponse()
        return await self._answer(lambda _: self._service.list_models(), empty, grpc_context)

    async def GetStatus(  # noqa: N802
        self, request: bytes, grpc_context: RayServegRPCContext
    ) -> inference_pb2.GetStatusResponse:
        empty = inference_pb2.GetStatusResponse()
        return await self._answer(lambda _: self._service.report(), empty, grpc_context, for_operators=True)

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> health_pb2.HealthCheckResponse:
        return self._service.health.check(request.service, grpc_context)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        async for response in self._service.health.watch(request.service, grpc_context):
            yield response

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The HTTP side, which Serve calls for once the constructor is done."""
        return build_http(self._service)

    async def _answer(
        self,
        call: Callable[[Caller], T | Awaitable[T]],
        empty: T,
        context: RayServegRPCContext,
        for_operators: bool = False,
    ) -> T:
        """What ``call`` returns to a caller who may ask; an error becomes the status, beside an ``empty`` answer."""
        gate = self._service.gate
        try:
            caller = (gate.admit_operator if for_operators else gate.admit)(status.metadata(context))
            answer = call(caller)
            return await answer if isinstance(answer, Awaitable) else answer
        except BatonError as error:
            status.set_on(context, error)
            return empty


class _WorkerReplica:
    """What both pools' replicas share: build the worker, publish its address, fail the health check when it broke."""

    _role: Role
    _worker_class: type[PrefillWorker] | type[DecodeWorker]

    async def __init__(self, tree: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        config = parse(tree)
        logs.configure(config.observe, f"{self._role} {serve.get_replica_context().replica_id.unique_id}")
        require_key(config.security)
        if config.handoff.ucx_tls:
            os.environ["UCX_TLS"] = config.handoff.ucx_tls  # UCX reads it once, when the first agent starts
        context = serve.get_replica_context()
        self._drain_s = getattr(config, self._role).drain_s
        self._host = config.worker_host or ray.util.get_node_ip_address()
        if self._host.startswith("127."):  # UCX listens on every network otherwise, to anybody (docs/security.md)
            os.environ.setdefault("UCX_NET_DEVICES", "lo")
        pool: PoolConfig = getattr(config, self._role)
        self._max_running = pool.max_running
        # Before the model's threads and ranks start: they stay where their process is.
        self._cores = affinity.pin(_threads(config, pool) * pool.tensor_parallel) if pool.pin else None
        model, ranks = await on_own_thread(partial(_load, config, pool))

        def make() -> PrefillWorker | DecodeWorker:
            return self._worker_class(
                model, config, worker_id=context.replica_id.unique_id, host=self._host, ranks=ranks
            )

        self._worker = await on_own_thread(make)  # it waits for the ranks and compiles what its kernels need
        await self._worker.start()

    def record_replica_metadata(self) -> dict[str, str | int]:
        return {
            "role": self._role,
            "worker_id": self._worker.worker_id,
            "host": self._host,
            "port": self._worker.port,
            "generation": self._worker.generation,
        }

    async def __del__(self) -> None:
        """Serve awaits it when this replica must go, and kills the process when the deployment's grace is over."""
        await self._worker.drain(self._drain_s)
        await self._worker.close()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For :class:`deploy.scaling.LoadPolicy`; Serve asks where a pool has ``max_replicas``."""
        load = self._worker.load()
        return {LOAD: prefill_load(load) if self._role == "prefill" else decode_load(load, self._max_running)}

    def check_health(self) -> None:
        if self._worker.failure is not None:
            raise RuntimeError(f"the engine failed: {self._worker.failure!r}")


class PrefillReplica(_WorkerReplica):
    _role = "prefill"
    _worker_class = PrefillWorker


class DecodeReplica(_WorkerReplica):
    _role = "decode"
    _worker_class = DecodeWorker


def _load(config: Config, pool: PoolConfig) -> tuple[Model, Ranks | None]:
    """This process's model; the other ranks, if there are any, load theirs meanwhile."""
    folder, threads = _folder(config), _threads(config, pool)
    dtype, max_context = config.model.dtype, config.model.max_context
    ranks = start_ranks(folder, dtype, threads, pool, max_context=max_context)
    comm = ranks.comm if ranks is not None else None
    return load_model(folder, dtype, threads, comm, max_context=max_context), ranks


def _folder(config: Config) -> Path:
    return hub.resolve(config.model.id, Path(config.model.cache_dir).expanduser())


def _threads(config: Config, pool: PoolConfig) -> int:
    """Threads of one rank; by default all ranks of all workers share this machine's cores evenly."""
    if pool.threads:
        return pool.threads
    ranks = sum(pool.replicas * pool.tensor_parallel for pool in (config.prefill, config.decode))
    return max(1, (os.cpu_count() or 1) // ranks)
