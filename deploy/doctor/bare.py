"""Two workers without a model, each a process of its own, for handoffs where no cluster runs."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import IO

from baton.config_handoff import HandoffConfig
from baton.errors import ConfigError, Unavailable
from baton.layout import KVLayout
from baton.secure import ClusterKey
from deploy.doctor.ask import Place
from kvtransfer.bare_worker import HOST, Order

START_S = 120.0  # importing torch, compiling the codecs on first use
END_S = 10.0


@contextlib.contextmanager
def workers(layout: KVLayout, handoff: HandoffConfig) -> Iterator[tuple[Place, Place, ClusterKey]]:
    """A prefill and a decode worker with the configuration's transport and buffers, and the key that they demand.

    Raises :class:`ConfigError` or :class:`Unavailable` with a worker's own reason when one does not start.
    """
    key = secrets.token_urlsafe(48)
    with contextlib.ExitStack() as stack:
        started = {
            role: stack.enter_context(_process(Order(role, layout, handoff, key))) for role in ("prefill", "decode")
        }
        places = [Place(f"bare {role}", role, HOST, _port(role, *process)) for role, process in started.items()]
        yield places[0], places[1], ClusterKey(key)


@contextlib.contextmanager
def _process(order: Order) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """Ends with the block: at first by closing its standard input."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvtransfer.bare_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ,
        )  # fmt: skip
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it ended already, and its log says why
                process.stdin.write(order.line() + "\n")
                process.stdin.flush()
            yield process, log
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
                process.communicate(timeout=END_S)
            if process.poll() is None:
                process.kill()
                process.wait()


def _port(role: str, process: subprocess.Popen[str], log: IO[str]) -> int:
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], START_S)[0]:
        raise Unavailable(f"a {role} process did not start within {START_S:.0f} s")
    said = process.stdout.readline()
    if not said:
        log.seek(0)
        last = (log.read().strip().splitlines() or ["without a word"])[-1]
        raise Unavailable(f"a {role} process ended at its start: {last}")
    answer = json.loads(said)
    if "error" in answer:
        raise ConfigError(answer["error"], field=answer["field"])
    return int(answer["port"])
