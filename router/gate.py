"""Who gets in at the front: every call shows its API key here before anything of it is read or parsed (ADR 13).

The keys' file is looked at once a second at most, when somebody calls, so that keys come and go without a restart. Of a
file that cannot be read or parsed the keys of before stay: half a file locks nobody out and lets nobody in.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from baton.api_keys import ANYBODY, MAX_FILE_BYTES, Caller, Keyring
from baton.config import Config
from baton.errors import ConfigError, Forbidden, Unauthenticated
from baton.files import read_text
from baton.secure import ClusterKey

log = logging.getLogger(__name__)

AUTHORIZATION = "authorization"
FRONT_HEADER = "x-baton-front"  # set by the ingress on everything that it lets pass, whatever the client sent
RELOAD_S = 1.0
LOG_S = 1.0  # refusals are logged at most this often

Metadata = Mapping[str, str | bytes]
_Version = tuple[int, int, int]  # mtime, size, inode


class Gate:
    """One per router. Open to anybody where the configuration names no keys."""

    def __init__(self, config: Config, key: ClusterKey | None = None) -> None:
        """``key``: the cluster's. Raises :class:`ConfigError` where the file is missing or wrong now."""
        path = config.security.api_keys_file
        self._path = Path(path).expanduser() if path else None
        self._passage = front_token(key) if config.ingress.tls.on and key is not None else ""
        self._keyring, self._version = Keyring(), (0, 0, 0)
        if self._path is not None:
            self._read(self._path)
        self._looked_at_s, self._logged_at_s = time.monotonic(), -LOG_S
        self.refused = 0  # calls without a good key, or past the ingress

    def admit(self, metadata: Metadata) -> Caller:
        """Whose call it is, by its HTTP headers or gRPC metadata (names in lower case). Raises Unauthenticated."""
        if self._passage and not _same(metadata.get(FRONT_HEADER, ""), self._passage):
            raise self._refusal("this port is for the ingress, which alone checks certificates")
        if self._path is None:
            return ANYBODY
        self._reload(self._path)
        kind, _, presented = _text(metadata.get(AUTHORIZATION, "")).strip().partition(" ")
        if not presented:
            raise self._refusal("an API key is needed: send it as 'Authorization: Bearer KEY'")
        caller = self._keyring.find(presented.strip()) if kind.lower() == "bearer" else None
        if caller is None:
            raise self._refusal("the API key is wrong or was revoked")
        return caller

    def admit_operator(self, metadata: Metadata) -> Caller:
        """As :meth:`admit`, for what concerns all tenants. Raises Forbidden for the key of an ordinary one."""
        caller = self.admit(metadata)
        if not caller.operator:
            raise Forbidden("this needs an operator's key (`baton keys create --operator`)")
        return caller

    def _reload(self, path: Path) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_at_s < RELOAD_S:
            return
        self._looked_at_s = now_s
        try:
            if _version(path) != self._version:
                self._read(path)
        except ConfigError as error:
            log.error("the API keys of before stay in force: %s", error)

    def _read(self, path: Path) -> None:
        version = _version(path)  # of before it is read: a change meanwhile is noticed the next time
        self._keyring, self._version = read_keys(path), version
        log.info("%s: %d API keys", path, len(self._keyring.keys))

    def _refusal(self, why: str) -> Unauthenticated:
        self.refused += 1
        now_s = time.monotonic()
        if now_s - self._logged_at_s >= LOG_S:
            log.warning("call refused: %s (%d so far)", why, self.refused)
            self._logged_at_s = now_s
        return Unauthenticated(why)


def read_keys(path: Path) -> Keyring:
    """The keys in the file at ``path``. Raises :class:`ConfigError`."""
    return Keyring.parse(read_text(path, field="security.api_keys_file", most_bytes=MAX_FILE_BYTES))


def front_token(key: ClusterKey) -> str:
    """What the ingress adds to every call, so that routers know those that came by another way."""
    return key.derive("front", 32).hex()


def _version(path: Path) -> _Version:
    try:
        state = path.stat()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field="security.api_keys_file") from None
    return state.st_mtime_ns, state.st_size, state.st_ino


def _same(presented: str | bytes, wanted: str) -> bool:
    return hmac.compare_digest(_text(presented).encode(errors="replace"), wanted.encode())


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
