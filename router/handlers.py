"""Registers the contract's methods on a gRPC server with the requests left as bytes.

The generated registration decodes requests inside gRPC, which answers undecodable ones with UNKNOWN. The service
decodes them itself, so that they are INVALID_ARGUMENT like every other bad request.
"""

from __future__ import annotations

import grpc

from baton.wire import inference_pb2

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"]


def add_inference_to_server(servicer: object, server: grpc.Server) -> None:
    """``servicer`` has a method per RPC, which takes the request's bytes and returns or yields messages."""
    handlers = {}
    for method in SERVICE.methods:
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        handlers[method.name] = make(
            getattr(servicer, method.name), response_serializer=lambda message: message.SerializeToString()
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))
