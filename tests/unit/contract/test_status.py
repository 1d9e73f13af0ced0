"""Errors on a real channel: code, message, and details that a client can read without parsing text."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from baton.errors import (
    BatonError,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
    ProtocolError,
    Unavailable,
)
from baton.wire import inference_pb2 as pb
from baton.wire import inference_pb2_grpc
from router import status

ERRORS: list[tuple[BatonError, grpc.StatusCode]] = [
    (InvalidRequest("sampling.top_p", "is 2; allowed: (0, 1]"), grpc.StatusCode.INVALID_ARGUMENT),
    (NotFound("model", "unknown model 'x'"), grpc.StatusCode.NOT_FOUND),
    (Overloaded("queue is full", retry_after_ms=1500), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineExceeded("time is up", field="budget_ms"), grpc.StatusCode.DEADLINE_EXCEEDED),
    (Cancelled("client left"), grpc.StatusCode.CANCELLED),
    (Unavailable("worker lost"), grpc.StatusCode.UNAVAILABLE),
    (Internal("a defect"), grpc.StatusCode.INTERNAL),
    (ProtocolError("bad frame"), grpc.StatusCode.INTERNAL),
    (ConfigError("bad key", field="model.id"), grpc.StatusCode.FAILED_PRECONDITION),
    (InvalidRequest("prompt", "漢🙂\n" * 5000), grpc.StatusCode.INVALID_ARGUMENT),
]


class Refusing(inference_pb2_grpc.InferenceServicer):  # type: ignore[misc]
    """Answers every request with the error at the index in its ``model``."""

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        status.set_on(context, ERRORS[int(request.model)][0])
        yield from ()


@pytest.fixture(scope="module")
def stub() -> Iterator[Any]:
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        inference_pb2_grpc.add_InferenceServicer_to_server(Refusing(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield inference_pb2_grpc.InferenceStub(channel)
        server.stop(0).wait(5)


@pytest.mark.parametrize("index", range(len(ERRORS)), ids=[type(error).__name__ for error, _ in ERRORS])
def test_a_client_reads_code_message_and_details(stub: Any, index: int) -> None:
    error, code = ERRORS[index]
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(pb.GenerateRequest(model=str(index)), timeout=10))
    assert caught.value.code() is code
    message = caught.value.details()
    assert str(error).startswith(message)
    assert len(message.encode()) > min(len(str(error).encode()), status.MAX_MESSAGE_BYTES) - 4
    metadata = {item.key: item.value for item in caught.value.trailing_metadata()}
    rich = status_pb2.Status.FromString(metadata[status.DETAILS_KEY])
    assert (rich.code, rich.message) == (code.value[0], message)
    details = {detail.TypeName(): detail for detail in rich.details}
    assert ("google.rpc.BadRequest" in details) is bool(error.field)
    assert ("google.rpc.RetryInfo" in details) is bool(error.retry_after_ms)
    if error.field:
        bad = error_details_pb2.BadRequest()
        details["google.rpc.BadRequest"].Unpack(bad)
        assert [violation.field for violation in bad.field_violations] == [error.field]
        assert error.message.startswith(bad.field_violations[0].description)
        assert bad.field_violations[0].description


def test_a_busy_service_says_when_to_come_back() -> None:
    told = status.of(Overloaded("queue is full", retry_after_ms=1500))
    metadata = dict(told.trailing_metadata)
    assert metadata[status.PUSHBACK_KEY] == "1500"
    details = metadata[status.DETAILS_KEY]
    assert isinstance(details, bytes)
    retry = error_details_pb2.RetryInfo()
    status_pb2.Status.FromString(details).details[0].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1500


def test_an_error_without_advice_pushes_nobody_back() -> None:
    assert [key for key, _ in status.of(Internal("a defect")).trailing_metadata] == [status.DETAILS_KEY]
