"""A small synchronous client of the public contract: what ``baton generate``, ``chat`` and ``status`` speak with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn, Self

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from baton.errors import from_code
from baton.ledger import Ledger
from baton.wire import inference_pb2 as pb
from baton.wire import inference_pb2_grpc
from router.status import DETAILS_KEY

STATUS_TIMEOUT_S = 10.0
MAX_MESSAGE_BYTES = 64 << 20


class Client:
    """One connection to a gRPC endpoint. Every method raises :class:`baton.errors.BatonError` when the call fails."""

    def __init__(self, address: str) -> None:
        self._address = address
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        self._channel = grpc.insecure_channel(address, options=options)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def generate(self, request: pb.GenerateRequest, *, timeout_s: float) -> Iterator[pb.GenerateResponse]:
        """The responses as they come. Closing the iterator, or an exception in its consumer, cancels the call."""
        call = self._stub.Generate(request, timeout=timeout_s)
        try:
            yield from call
        except grpc.RpcError as error:
            _explain(error)
        finally:
            call.cancel()

    def status(self) -> pb.GetStatusResponse:
        try:
            answer: pb.GetStatusResponse = self._stub.GetStatus(pb.GetStatusRequest(), timeout=STATUS_TIMEOUT_S)
        except grpc.RpcError as error:
            _explain(error)
        return answer

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def ledger_of(wire: pb.StageLedger) -> Ledger:
    """The ledger that a last response carries."""
    return Ledger(
        total_s=wire.total_s,
        stages={stage.name: stage.seconds for stage in wire.stages},
        transfer_busy_s=wire.transfer_busy_s,
        transfer_bytes=wire.transfer_bytes,
        codec=wire.codec,
        transport=wire.transport,
    )


def _explain(error: Any) -> NoReturn:
    """Raises the error that the server described: the matching class, the field at fault, when to come back."""
    field, message, retry_after_ms = "", error.details() or "no reason given", 0
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            with contextlib.suppress(DecodeError):  # a proxy's, not ours; the plain message remains
                field, message, retry_after_ms = _details(status_pb2.Status.FromString(value), message)
    raise from_code(error.code().name, message, field=field, retry_after_ms=retry_after_ms) from None


def _details(status: status_pb2.Status, message: str) -> tuple[str, str, int]:
    field, retry_after_ms = "", 0
    bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(bad) and bad.field_violations:
            field, message = bad.field_violations[0].field, bad.field_violations[0].description
        elif detail.Unpack(retry):
            retry_after_ms = retry.retry_delay.ToMilliseconds()
    return field, message, retry_after_ms
