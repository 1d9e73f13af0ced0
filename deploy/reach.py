"""How the commands reach an endpoint: which one, with which API key, and by TLS or not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from baton.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from baton.client import Client, Tls

KEY_VARIABLE = "BATON_API_KEY"
MAX_KEY_CHARS = 4096

Name = Annotated[str, typer.Option(help="Name of the local cluster.")]
Address = Annotated[str | None, typer.Option(help="host:port of a gRPC endpoint, instead of a local cluster's.")]
ApiKeyFile = Annotated[
    Path | None, typer.Option(envvar="BATON_API_KEY_FILE", help=f"File with the API key; ${KEY_VARIABLE} may hold it.")
]
TlsCa = Annotated[
    Path | None, typer.Option(envvar="BATON_TLS_CA", help="PEM file with the authority of the endpoint's certificate.")
]
TlsCert = Annotated[
    Path | None, typer.Option(envvar="BATON_TLS_CERT", help="PEM file with our own certificate, for mutual TLS.")
]
TlsKey = Annotated[Path | None, typer.Option(envvar="BATON_TLS_KEY", help="PEM file with its private key.")]
UseTls = Annotated[bool, typer.Option("--tls", help="Use TLS, and trust this machine's own authorities.")]


@dataclass(frozen=True, slots=True)
class Reach:
    """``address``: of an endpoint; None for that of the local cluster called ``name``."""

    name: str
    address: str | None
    api_key_file: Path | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    use_tls: bool = False

    def client(self) -> Client:
        """Raises :class:`Unavailable` when no such cluster runs, :class:`ConfigError` for a file that is not there."""
        from baton.client import Client

        address, local_tls = self._endpoint()
        return Client(address, api_key=self._api_key(), tls=self._tls(local_tls))

    def _endpoint(self) -> tuple[str, bool]:
        """host:port, and whether it is known to speak TLS."""
        if self.address is not None:
            return self.address, False
        from baton.config import load
        from deploy import local

        endpoints = local.endpoints(self.name)
        if endpoints is None:
            raise Unavailable(f"no cluster named {self.name} is running; start it with `baton up`, or give --address")
        return endpoints.grpc, load(Path(endpoints.log_dir) / "config.yaml").ingress.tls.on

    def _api_key(self) -> str:
        if self.api_key_file is None:
            return os.environ.get(KEY_VARIABLE, "").strip()
        try:
            with self.api_key_file.open(encoding="utf-8") as file:
                return file.read(MAX_KEY_CHARS).strip()
        except OSError as error:
            raise ConfigError(f"cannot read {self.api_key_file}: {error.strerror}", field="api-key-file") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{self.api_key_file} is not text", field="api-key-file") from None

    def _tls(self, wanted: bool) -> Tls | None:
        from baton.client import Tls

        if not (wanted or self.use_tls or self.tls_ca or self.tls_cert or self.tls_key):
            return None
        return Tls(ca=self.tls_ca, cert=self.tls_cert, key=self.tls_key)
