"""The doctor's examination of a cluster against real workers with a real model, without Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from baton.config import Config, parse
from baton.secure import KEY_VARIABLE, ClusterKey
from deploy.doctor import examine
from deploy.doctor.findings import Finding, exit_code
from engine.build import load_model
from router.service import InferenceService
from router.suspicion import ONE_EVENT_S, STRIKES

if TYPE_CHECKING:
    from tests.unit.workers.conftest import Serve

KEY = "k" * 40
CONFIG = parse(
    {
        "model": {"dtype": "float32", "max_context": 512},
        "prefill": {"kv_tokens": 1024, "threads": 1, "page_tokens": 16},
        "decode": {"kv_tokens": 1024, "threads": 1, "page_tokens": 32},
        "handoff": {"transport": "tcp", "landing_bytes": 32 << 20, "staging_bytes": 32 << 20},
    }
)


@pytest.fixture
async def service(serve: Serve, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[InferenceService]:
    """A router that knows one prefill and one decode worker."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    model = await asyncio.to_thread(load_model, model_folder, "float32", 1, None)
    async with serve(model, CONFIG) as service:
        yield service


async def examined(service: InferenceService, config: Config | None, key: str | None) -> list[Finding]:
    status, cluster_key = service.report(), None if key is None else ClusterKey(key)
    return await asyncio.to_thread(lambda: list(examine.cluster(status, config, cluster_key)))


def held(service: InferenceService) -> int:
    loads = [worker.load for pool in service.report().pools for worker in pool.workers]
    return sum(load.handoffs + load.buffer_bytes_used + load.pages_used for load in loads)


async def test_workers_of_a_cluster_are_examined_and_left_as_they_were(service: InferenceService) -> None:
    found = await examined(service, CONFIG, KEY)
    # How fast a handoff is depends on what else this machine does: slow is a warning, and only there.
    assert [one for one in found if one.status != "ok" and (one.check, one.status) != ("handoff, raw", "warn")] == []
    pairs = {one.subject for one in found if one.check == "handoff, raw"}
    assert pairs == {"prefill p0 -> decode d0", "decode d0 -> prefill p0"}
    assert {one.found for one in found if one.check == "transport"} == {"tcp"}
    async with asyncio.timeout(5):
        while held(service):
            await asyncio.sleep(0.05)

    (peer,) = service.pools.of("prefill")
    for number in range(STRIKES):  # a suspected worker is probed: it may serve, and the probe says what is wrong
        peer.suspicion.strike(time.monotonic() - 2 * ONE_EVENT_S * (STRIKES - 1 - number))
    found = await examined(service, CONFIG, KEY)
    assert [(one.check, one.subject) for one in found if one.status != "ok" and "handoff" not in one.check] == [
        ("state", "prefill p0")
    ]
    assert "prefill p0 -> decode d0" in {one.subject for one in found if one.check == "handoff, raw"}
    assert service.usable() == {"prefill": 1, "decode": 1}

    other = parse({"handoff": {"transport": "nixl"}})
    found = await examined(service, other, KEY)
    assert exit_code(found) == 1
    assert [one.found for one in found if one.status == "fail"] == ["tcp, configured: nixl"]

    found = await examined(service, None, None)
    assert {one.subject for one in found if one.check == "worker" and one.status == "fail"} == {
        "prefill p0",
        "decode d0",
    }
