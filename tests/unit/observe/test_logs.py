"""Log lines: what they hold, whose request they are about, and that nothing of a prompt can get into them by a repr."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from baton import logs
from baton.config_observe import ObserveConfig
from baton.request import Sampling, Work
from baton.tasks import Jobs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What the root logger writes; it is as before afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    context = logs._about.set(logs.NOBODY)  # others' tests may have left theirs
    yield io.StringIO()
    logs._about.reset(context)
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_json_line_is_one_object_with_ids_extras_and_traceback(stream: io.StringIO) -> None:
    logs.configure(ObserveConfig(log_format="json"), "router r-1", stream)

    async def request() -> None:
        logs.about(request_id="r-1-ff", trace_id="")
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logging.getLogger("router.x").exception("it\nbroke", extra={"seconds": 0.5})

    asyncio.run(request())
    [line] = lines(stream)
    assert (line["level"], line["logger"], line["process"]) == ("error", "router.x", "router r-1")
    assert (line["message"], line["request_id"], line["seconds"]) == ("it\nbroke", "r-1-ff", 0.5)
    assert "ValueError: two\nlines" in line["exception"]
    assert "trace_id" not in line
    assert line["time"].endswith("Z")


def test_ids_belong_to_their_task_alone(stream: io.StringIO) -> None:
    logs.configure(ObserveConfig(log_format="json"), "router r", stream)
    log = logging.getLogger("router.x")

    async def request(name: str) -> None:
        logs.about(request_id=name)
        await asyncio.sleep(0)
        log.info("from the task")
        await asyncio.to_thread(log.info, "from its thread")

    async def run() -> None:
        await asyncio.gather(request("a"), request("b"))
        log.info("from outside")

    asyncio.run(run())
    told = [(line["message"], line.get("request_id")) for line in lines(stream)]
    assert sorted(told[:-1]) == [(f"from {who}", name) for who in ("its thread", "the task") for name in "ab"]
    assert told[-1] == ("from outside", None)


def test_text_lines_end_with_the_ids(stream: io.StringIO) -> None:
    logs.configure(ObserveConfig(log_level="warning"), "decode d", stream)

    async def request() -> None:
        logs.about(request_id="abc")
        logging.getLogger("decode_worker").warning("late", extra={"seconds": 2})
        logging.getLogger("decode_worker").info("below the level")

    asyncio.run(request())
    [line] = stream.getvalue().splitlines()
    assert line.endswith("WARNING decode d decode_worker: late [request_id=abc seconds=2]")


def test_a_workers_lines_name_the_request_that_they_are_about(stream: io.StringIO) -> None:
    logs.configure(ObserveConfig(log_format="json"), "decode d", stream)

    async def fails() -> None:
        logging.getLogger("decode_worker").info("begun")
        raise RuntimeError("no")

    async def run() -> None:
        broke: list[str] = []
        jobs = Jobs[str](lambda owner, request_id: broke.append(request_id))
        jobs.start("router", "good", asyncio.Event().wait)  # type: ignore[arg-type]
        jobs.start("router", "bad", fails)
        await asyncio.sleep(0.01)
        jobs.cancel("router", "good")
        await asyncio.sleep(0.01)
        assert broke == ["bad"]

    asyncio.run(run())
    assert {(line["request_id"], line["level"]) for line in lines(stream)} == {
        ("bad", "info"),
        ("bad", "error"),
        ("good", "info"),
    }


def test_what_a_request_holds_is_not_in_its_repr() -> None:
    work = Work("id", prompt=(40401, 40402), sampling=Sampling(), priority=0, budget_s=1.0, output=(40403,))
    assert "4040" not in repr(work)
