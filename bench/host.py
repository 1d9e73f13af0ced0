"""The machine under a run, where the service is on it: its cores, its speed, what requests cost beside their steps."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import asdict
from typing import Any

from baton.wire import inference_pb2 as pb
from bench import errands, machine
from bench.load import Target
from placement.pulse import Pulse, course, usual

LOCAL = ("127.0.0.1", "localhost")


class Host:
    """Use with ``with``. ``address``: of the service; of one elsewhere only this machine's cores are read."""

    def __init__(self, address: str) -> None:
        name, _, port = address.rpartition(":")
        self._ours = machine.service(int(port)) if name in LOCAL and port.isdigit() else []

    def __enter__(self) -> Host:
        self._held = contextlib.ExitStack()
        self._pulse = self._held.enter_context(Pulse()) if self._ours else None
        self.begin()
        return self

    def __exit__(self, *exc: object) -> None:
        self._held.close()

    async def at_rest(self, target: Target, model: pb.Model, seconds: float) -> dict[str, Any]:
        """Cores in use while nobody asks for anything, and what a request costs beside its steps."""
        self.begin()
        await asyncio.sleep(seconds)
        rest = self._meter.read()
        cost = asdict(await errands.measure(target, model, self._ours, rest)) if self._ours else None
        return {"at_rest": asdict(rest), "errands": cost}

    def begin(self) -> None:
        """What is read next is from now on."""
        self._meter = machine.Meter(self._ours)
        if self._pulse is not None:
            self._pulse.beats()
        self._begun_s = time.perf_counter()

    def read(self) -> dict[str, Any]:
        """Since :meth:`begin`. ``course``: the pulse at (seconds since then) and from there on."""
        cores = asdict(self._meter.read())
        if self._pulse is None:
            return {"cores": cores, "pulse_s": None, "course": []}
        beats = self._pulse.beats()
        return {
            "cores": cores,
            "pulse_s": usual(beats),
            "course": [(round(at_s - self._begun_s, 3), seconds) for at_s, seconds in course(beats)],
        }
