"""The two examinations, finding by finding as each is known: of this machine, and of a running cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

from baton import host
from baton.config import Config, load
from baton.config_security import SecurityConfig
from baton.errors import BatonError, ConfigError
from baton.secure import ClusterKey, load_key
from baton.wire import inference_pb2 as pb
from deploy import local
from deploy.doctor import ask, bare, gather, local_checks, pair_checks
from deploy.doctor.ask import Place
from deploy.doctor.facts import ModelFiles, Worker
from deploy.doctor.findings import Finding, ok, warn
from deploy.reach import Reach

PAIRS_S = 300.0  # for all pairs of a cluster; those left then are named


def machine(path: Path | None) -> Iterator[Finding]:
    """This machine and the configuration in ``path``: whether ``baton up`` would work, and a handoff on it."""
    facts, torch, here = host.gather(), gather.torch(), gather.machine()
    yield local_checks.python(facts)
    yield from local_checks.packages(gather.packages())
    yield local_checks.torch(facts, torch)
    yield local_checks.compiler(here)
    yield local_checks.shared_memory(facts)
    yield local_checks.disk(here)
    try:
        config = load(path)
        key = load_key(config.security)
    except ConfigError as error:
        yield local_checks.configuration(str(path or "defaults"), error)
        return
    yield local_checks.configuration(str(path or "defaults"), None)
    yield local_checks.cluster_key(config.security, given=key is not None)
    yield local_checks.memlock(facts, config)
    yield local_checks.open_files(facts, config)
    for port in gather.ports(config):
        yield local_checks.port(port, config.name)
    if torch.error:
        return
    model = gather.model(config.model)
    yield local_checks.model(model)
    yield from local_checks.tensor_parallel(config, model, torch)
    if (memory := local_checks.memory(here, config, model, torch)) is not None:
        yield memory
    yield from _handoff_here(config, model)


def _handoff_here(config: Config, model: ModelFiles) -> Iterator[Finding]:
    """A real handoff between two processes, with the model's layout and the configuration's transport."""
    skipped = local_checks.no_handoff(config, model)
    if skipped is not None or model.layout is None:
        yield from () if skipped is None else (skipped,)
        return
    try:
        with bare.workers(model.layout, config.handoff) as (prefill, decode, key):
            yield from pairs(
                [prefill], [decode], transport=config.handoff.transport, codec=config.handoff.codec, key=key
            )
    except BatonError as error:
        yield local_checks.no_worker(config.handoff, error)


def running(reach: Reach, path: Path | None) -> Iterator[Finding]:
    """The cluster that ``reach`` leads to; ``path``: the configuration it should have.

    Raises :class:`Unavailable` when there is no such cluster or it does not answer.
    """
    if reach.address is None and path is None and (endpoints := local.endpoints(reach.name)) is not None:
        path = Path(endpoints.log_dir) / "config.yaml"
    config = None if path is None else load(path)
    key = load_key(config.security if config is not None else SecurityConfig())
    with reach.client() as client:
        status = client.status()
    yield from cluster(status, config, key)


def cluster(status: pb.GetStatusResponse, configured: Config | None, key: ClusterKey | None) -> Iterator[Finding]:
    """Every live worker of a running cluster, and a handoff between every pair of them."""
    transport = configured.handoff.transport if configured is not None else status.transport
    places: dict[str, list[Place]] = {"prefill": [], "decode": []}
    for pool in status.pools:
        for worker in pool.workers:
            yield pair_checks.state(f"{pool.role} {worker.id}", worker.state)
            if worker.state in (pb.WORKER_STATE_READY, pb.WORKER_STATE_SUSPECT):
                address, _, port = worker.address.rpartition(":")
                places.setdefault(pool.role, []).append(
                    Place(f"{pool.role} {worker.id}", pool.role, address, int(port), worker.generation)
                )
        if not pool.workers:
            yield pair_checks.empty(pool.role)
    if not places["prefill"]:
        yield ok("handoff", "all pools", "no prefill worker is ready: nothing is handed over")
    yield from pairs(
        places["prefill"], places["decode"], transport=transport, codec=status.codec, key=key, limits=configured
    )


def pairs(
    prefill: list[Place], decode: list[Place],
    *, transport: str, codec: str, key: ClusterKey | None, limits: Config | None = None,
) -> Iterator[Finding]:  # fmt: skip
    """The workers one by one, then each pair; ``limits``: the configuration that their machines must do for."""
    with asyncio.Runner() as runner:
        places = [*prefill, *decode]
        found = dict(zip(places, runner.run(ask.workers(places, key)), strict=True))
        yield from map(pair_checks.reached, found.values())
        yield from (finding for worker in found.values() if (finding := pair_checks.clock(worker)) is not None)
        if limits is not None:
            yield from _hosts(list(found.values()), limits)
        yield from pair_checks.versions(list(found.values()))
        deadline = time.monotonic() + PAIRS_S
        for sender, lander in ((one, other) for one in prefill for other in decode):
            if time.monotonic() >= deadline:
                yield _unprobed(sender, lander)
                continue
            pair = runner.run(ask.pair((sender, found[sender]), (lander, found[lander]), codec=codec, key=key))
            yield from pair_checks.pair(pair, transport)


def _hosts(workers: list[Worker], config: Config) -> list[Finding]:
    """The limits of the workers' processes and machines; one line for equal ones of one machine."""
    facts = [worker.host for worker in workers if worker.host is not None]
    return list(
        dict.fromkeys(
            finding
            for one in facts
            for finding in (
                local_checks.memlock(one, config),
                local_checks.open_files(one, config),
                local_checks.shared_memory(one),
            )
        )
    )


def _unprobed(sender: Place, lander: Place) -> Finding:
    return warn(
        "handoff", f"{sender.name} -> {lander.name}", f"not measured: {PAIRS_S:.0f} s are used up",
        why="nothing is known of this pair", fix="baton doctor   # once more, with fewer workers in the pools",
    )  # fmt: skip
