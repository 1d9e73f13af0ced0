"""Who may use the service, and how its ports defend themselves: ADR 10 inside the cluster, ADR 13 at the front."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated

from pydantic import Field, model_validator

from baton.config_types import Count, Frozen, Port, Seconds


class SecurityConfig(Frozen):
    cluster_key_file: str = Field(
        default="",
        description="File with the key that router and workers prove to each other; empty: `$BATON_CLUSTER_KEY`, or "
        "the one that `baton up` makes for its cluster.",
    )
    allow_unauthenticated: bool = Field(
        default=False, description="Without a cluster key, let anybody connect to workers instead of refusing to start."
    )
    api_keys_file: str = Field(
        default="",
        description="File with the clients' API keys, hashed, as `baton keys` writes it; empty: clients need none.",
    )
    allow_anonymous: bool = Field(
        default=False,
        description="Let `baton up` serve an address beyond loopback without API keys instead of refusing to start.",
    )


class IngressTls(Frozen):
    """TLS of both endpoints. With ``client_ca``, nobody without a certificate that it signed gets in."""

    cert: str = Field(default="", description="PEM file with the endpoints' certificate and chain; empty: no TLS.")
    key: str = Field(default="", description="PEM file with the certificate's private key, without a passphrase.")
    client_ca: str = Field(
        default="", description="PEM file with the authorities of clients' certificates; empty: clients need none."
    )

    @property
    def on(self) -> bool:
        return bool(self.cert)

    @model_validator(mode="after")
    def _together(self) -> IngressTls:
        if bool(self.cert) != bool(self.key):
            raise ValueError(f"cert and key belong together; missing: {'key' if self.cert else 'cert'}")
        if self.client_ca and not self.cert:
            raise ValueError("client_ca asks clients for certificates, which needs cert and key")
        return self


class IngressConfig(Frozen):
    host: str = Field(default="127.0.0.1", description="Address that the endpoints listen on and are announced under.")
    grpc_port: Port = Field(default=9000, description="Port of the gRPC endpoint.")
    http_port: Port = Field(default=8000, description="Port of the HTTP endpoint.")
    tls: IngressTls = Field(default_factory=IngressTls, description="TLS of both endpoints.")
    header_s: Seconds = Field(default=10.0, description="A request's headers, or a TLS handshake, may take so long.")
    body_s: Seconds = Field(default=30.0, description="A request's body may take so long to arrive.")
    idle_s: Seconds = Field(default=90.0, description="A connection without a request is cut after so long.")
    connections_per_address: Annotated[int, Field(ge=0)] = Field(
        default=1024, description="Most connections of one client address to one endpoint; 0: as many as there are."
    )
    max_connections: Count = Field(default=4096, description="Most connections of all clients.")

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the endpoints."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:  # a name, which may mean any address
            return False
