"""TLS contexts from ``handoff.tls``: 1.3 only, and mutual, so that both ends of a data connection prove themselves.

Workers are reached by address, so certificates are not matched to names: whoever holds a key that the configured
authority signed is a worker of this cluster. Give the authority nothing else to sign.
"""

from __future__ import annotations

import ssl

from baton.config_handoff import TlsConfig
from baton.errors import ConfigError


def server_context(tls: TlsConfig) -> ssl.SSLContext:
    """For the exporting end. Raises :class:`ConfigError` that names the field of a file that is not what it should."""
    return _context(tls, ssl.PROTOCOL_TLS_SERVER)


def client_context(tls: TlsConfig) -> ssl.SSLContext:
    """For the fetching end; raises as :func:`server_context`."""
    return _context(tls, ssl.PROTOCOL_TLS_CLIENT)


def _context(tls: TlsConfig, protocol: int) -> ssl.SSLContext:
    for name in ("cert", "key", "ca"):
        path = getattr(tls, name)
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise ConfigError(f"cannot read {path!r}: {error.strerror}", field=f"handoff.tls.{name}") from None
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(tls.ca)
    except ssl.SSLError as error:
        raise ConfigError(f"{tls.ca!r} holds no certificates: {error}", field="handoff.tls.ca") from None
    try:
        context.load_cert_chain(tls.cert, tls.key, password="")  # a passphrase would be asked for on the terminal
    except ssl.SSLError as error:
        raise ConfigError(f"{tls.cert!r} does not fit {tls.key!r}: {error}", field="handoff.tls.cert") from None
    return context
