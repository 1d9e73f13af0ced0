"""A client of the gRPC contract: :class:`Client`, and :class:`AsyncClient` for asyncio. Guide: docs/clients.md.

    with Client("127.0.0.1:9000") as client:
        for part in client.stream_chat([("user", "Why is the sky blue?")], max_tokens=64):
            print(part.text, end="", flush=True)

Imports neither torch nor ray: it runs wherever grpcio does.
"""

from __future__ import annotations

from baton.client.aio import AsyncClient
from baton.client.answers import Alternative, Answer, Model, Output, Part, TokenLogprob, Usage
from baton.client.asking import Options, Turn
from baton.client.blocking import Client
from baton.client.channel import Tls
from baton.client.retry import Retry

__all__ = [
    "Alternative",
    "Answer",
    "AsyncClient",
    "Client",
    "Model",
    "Options",
    "Output",
    "Part",
    "Retry",
    "Tls",
    "TokenLogprob",
    "Turn",
    "Usage",
]
