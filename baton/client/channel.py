"""What both clients connect with: TLS, key, keepalive, limits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from baton.errors import ConfigError, InvalidRequest

KEEPALIVE_S = 30.0  # without a byte from the server, while a call runs; then a ping
KEEPALIVE_TIMEOUT_S = 10.0  # for its answer; then the connection is given up and its calls are UNAVAILABLE
TIMEOUT_S = 600.0  # for a call that names no other
QUERY_TIMEOUT_S = 10.0  # for calls that compute nothing
MAX_MESSAGE_BYTES = 64 << 20
RECONNECT_MS = (100, 2000)  # first and longest pause between attempts to connect

Setting = tuple[str, str | int]
Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files. ``ca``: whom to trust, by default the machine's authorities. ``cert`` and ``key``: who we are, for
    mTLS. ``server_name``: the name that the server's certificate must carry, where it is not the address's host.
    """

    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    server_name: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises :class:`ConfigError` when a file cannot be read, or only one of ``cert`` and ``key`` is given."""
        if (self.cert is None) != (self.key is None):
            raise ConfigError("certificate and key go together", field="tls.key" if self.key is None else "tls.cert")
        ca, cert, key = (_read(name, getattr(self, name)) for name in ("ca", "cert", "key"))
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


@dataclass(frozen=True, slots=True)
class Connection:
    """One endpoint and how to talk to it. ``compress``: gzip for requests, and asked for in responses."""

    address: str
    api_key: str = ""
    tls: Tls | None = None
    compress: bool = False
    keepalive_s: float = KEEPALIVE_S
    keepalive_timeout_s: float = KEEPALIVE_TIMEOUT_S

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal():
            raise InvalidRequest("address", f"is {self.address!r}, allowed: host:port")
        if not self.api_key.isascii() or not self.api_key.isprintable():
            raise InvalidRequest("api_key", "has characters that no header can carry")  # never the key itself
        for name in ("keepalive_s", "keepalive_timeout_s"):
            if not getattr(self, name) > 0.0:
                raise InvalidRequest(name, f"is {getattr(self, name)}, allowed: above 0")

    def metadata(self) -> Metadata:
        """What every call carries."""
        key = (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()
        return (*key, ("baton-response-encoding", "gzip")) if self.compress else key

    def compression(self) -> grpc.Compression:
        return grpc.Compression.Gzip if self.compress else grpc.Compression.NoCompression

    def open(self, channels: Any) -> Any:
        """A channel made by ``channels``: the module ``grpc``, or ``grpc.aio``."""
        if self.tls is None:
            return channels.insecure_channel(self.address, options=self._settings())
        return channels.secure_channel(self.address, self.tls.credentials(), options=self._settings())

    def _settings(self) -> Sequence[Setting]:
        settings: list[Setting] = [
            ("grpc.keepalive_time_ms", round(1e3 * self.keepalive_s)),
            ("grpc.keepalive_timeout_ms", round(1e3 * self.keepalive_timeout_s)),
            ("grpc.http2.max_pings_without_data", 0),  # a quiet stream may be pinged for as long as it lasts
            # Keepalive waits for the ping by which gRPC measures bandwidth, and that one has a minute by default.
            ("grpc.http2.ping_timeout_ms", round(1e3 * self.keepalive_timeout_s)),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS[0]),
            ("grpc.max_reconnect_backoff_ms", RECONNECT_MS[1]),
            ("grpc.use_local_subchannel_pool", 1),  # a connection of its own, gone with the client
        ]
        if self.tls is not None and self.tls.server_name:
            settings.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return settings


def _read(name: str, path: str | os.PathLike[str] | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field=f"tls.{name}") from None
