"""How the end of a request is told: what counts as rejected, failed or given up, and against which class."""

from __future__ import annotations

import asyncio

import pytest

from baton.config import Config
from baton.errors import BatonError, DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from baton.request import Sampling, Work
from baton.wire import inference_pb2 as pb
from router.observer import Observer
from router.run import Run
from router.tracing import Output
from router.validate import ParsedRequest

ASKED = pb.GenerateRequest(prompt="Once upon", slo_class="interactive", n=3)
PARSED = ParsedRequest("mine", (1, 2), Sampling(), (), 0, 60.0, "auto", outputs=3)
ENDED = Output(Run(Work("r", (1, 2), Sampling(), 0, 60.0), "auto", 0.0, 60.0), 4, "length")


def after(
    error: BaseException,
    *,
    asked: pb.GenerateRequest = ASKED,
    parsed: ParsedRequest | None = PARSED,
    ended: int = 0,
) -> Observer:
    """An observer that saw one request of three outputs, ``ended`` of which had ended before ``error``."""
    observer = Observer(Config(), router_id="r")

    def serve() -> None:
        with observer.request(asked, 0.0, {}) as seen:
            if parsed is not None:
                seen.understood(parsed)
            seen.outputs += [ENDED] * ended
            raise error

    with pytest.raises(type(error)):
        serve()
    return observer


@pytest.mark.parametrize(
    ("error", "reason", "missed"),
    [
        (Overloaded("too much", reason="ttft"), "ttft", 3),
        (Overloaded("the worker's line is full"), "worker", 3),
        (InvalidRequest("stop", "is wrong"), "invalid_argument", 0),
        (InvalidRequest("prompt", "is too long", reason="context_length_exceeded"), "context_length_exceeded", 0),
    ],
)
def test_rejections_by_reason(error: BatonError, reason: str, missed: int) -> None:
    meters = after(error).meters
    assert dict(meters.rejections.sums) == {(reason,): 3}
    assert not meters.failures.sums
    assert (meters.judged["interactive"], meters.kept["interactive"]) == (missed, 0)


@pytest.mark.parametrize(("n", "outputs"), [(3, 3), (0, 1), (10**6, 1)])
def test_a_request_that_was_not_read_counts_for_what_it_asks(n: int, outputs: int) -> None:
    asked = pb.GenerateRequest(prompt="Once upon", slo_class="interactive", n=n)
    meters = after(Overloaded("too much", reason="inflight"), asked=asked, parsed=None).meters
    assert dict(meters.rejections.sums) == {("inflight",): outputs}
    assert meters.judged["interactive"] == outputs


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Unavailable("a worker is gone"), "UNAVAILABLE"),
        (DeadlineExceeded("late"), "DEADLINE_EXCEEDED"),
        (ZeroDivisionError(), "INTERNAL"),
    ],
)
def test_failures_by_code_are_misses_of_the_outputs_that_had_not_ended(error: BaseException, code: str) -> None:
    meters = after(error, ended=1).meters
    assert dict(meters.failures.sums) == {(code,): 2}
    assert meters.judged["interactive"] == 2
    assert not meters.rejections.sums


@pytest.mark.parametrize("error", [asyncio.CancelledError(), GeneratorExit()])
def test_what_clients_give_up_counts_for_nothing(error: BaseException) -> None:
    meters = after(error).meters
    assert not meters.rejections.sums
    assert not meters.failures.sums
    assert not sum(meters.judged.values())
