"""Clients' API keys: issued once, kept as salted hashes, one line of JSON per key (ADR 13).

    {"id": "k7Qm2xT9", "tenant": "acme", "salt": "...", "sha256": "...", "created": "2026-01-31", "operator": false,
     "requests_per_minute": 600, "tokens_per_minute": 0}

A key is ``bt-<id>-<secret>``. The id is public and finds the line; the secret has 256 random bits, so that one round
of SHA-256 is enough: there is nothing to guess that a slow hash would protect, and a slow one would let strangers burn
the router's processor with wrong keys.

No I/O here: ``router.gate`` reads the file, ``baton keys`` writes it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field, ValidationError

from baton.config_types import Frozen
from baton.errors import ConfigError

MAX_KEYS = 10_000
MAX_FILE_BYTES = 4 << 20
TENANT = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_KEY = re.compile(r"bt-([A-Za-z0-9]{8})-([A-Za-z0-9_-]{43})")
_ID_CHARACTERS = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_SECRET_BYTES = 32
_NOBODY = "0" * 64  # what a key of an unknown id is compared with, so that ids cannot be told from answers' times

HexOf32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Limit = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What all requests with one tenant's keys may use together. 0: as much as there is."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0  # of prompts and outputs


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf a request is served."""

    tenant: str
    limits: TenantLimits = TenantLimits()
    operator: bool = False  # may read what concerns all tenants


ANYBODY = Caller("", operator=True)  # where no keys are asked for


class ApiKey(Frozen):
    """One line of the file; nothing in it lets anybody make requests."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9]{8}$")]
    tenant: Annotated[str, Field(pattern=TENANT)]
    salt: HexOf32
    sha256: HexOf32
    created: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    operator: bool = False
    requests_per_minute: Limit = 0
    tokens_per_minute: Limit = 0

    @property
    def caller(self) -> Caller:
        return Caller(self.tenant, self.limits, self.operator)

    def limited(self, limits: TenantLimits) -> ApiKey:
        """The same key with other limits."""
        return self.model_copy(update=asdict(limits))

    @property
    def limits(self) -> TenantLimits:
        return TenantLimits(self.requests_per_minute, self.tokens_per_minute)


def issue(
    tenant: str, *, created: str, operator: bool = False, limits: TenantLimits | None = None
) -> tuple[str, ApiKey]:
    """A new key: the text for the client, which is kept nowhere, and the line for the file."""
    if not re.fullmatch(TENANT, tenant):
        raise ConfigError(f"{tenant!r} is no name of a tenant; allowed: {TENANT}", field="tenant")
    key_id = "".join(secrets.choice(_ID_CHARACTERS) for _ in range(8))
    secret, salt = secrets.token_urlsafe(_SECRET_BYTES), secrets.token_bytes(32)
    kept = ApiKey(
        id=key_id,
        tenant=tenant,
        salt=salt.hex(),
        sha256=_digest(salt, secret),
        created=created,
        operator=operator,
        **asdict(limits or TenantLimits()),
    )
    return f"bt-{key_id}-{secret}", kept


class Keyring:
    """The keys of one file. Tenants may have several, all with the same limits."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        """Raises :class:`ConfigError` where two keys have one id, or keys of one tenant other limits."""
        self._keys: dict[str, ApiKey] = {}
        self.tenants: dict[str, TenantLimits] = {}
        for key in keys:
            if key.id in self._keys:
                raise ConfigError(f"two keys have the id {key.id}", field="security.api_keys_file")
            if self.tenants.setdefault(key.tenant, key.limits) != key.limits:
                raise ConfigError(f"keys of tenant {key.tenant} have different limits", field="security.api_keys_file")
            self._keys[key.id] = key
        if len(self._keys) > MAX_KEYS:
            raise ConfigError(f"holds {len(self._keys)} keys; at most {MAX_KEYS}", field="security.api_keys_file")

    @classmethod
    def parse(cls, text: str) -> Keyring:
        """The keys in a file's ``text``; raises :class:`ConfigError` that names the line at fault."""
        return cls(_parsed(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip())

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        return tuple(self._keys.values())

    def text(self) -> str:
        """The file's content."""
        return "".join(json.dumps(key.model_dump()) + "\n" for key in self._keys.values())

    def find(self, presented: str) -> Caller | None:
        """Whose key ``presented`` is; None if nobody's. The secret is compared in constant time."""
        parts = _KEY.fullmatch(presented)
        if parts is None:
            return None
        key = self._keys.get(parts[1])
        salt = bytes.fromhex(key.salt if key else _NOBODY)
        matches = hmac.compare_digest(_digest(salt, parts[2]), key.sha256 if key else _NOBODY)
        return key.caller if key is not None and matches else None


def _parsed(number: int, line: str) -> ApiKey:
    try:
        return ApiKey.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"line {number} is no key: {where + ': ' if where else ''}{first['msg']}", field="security.api_keys_file"
        ) from None


def _digest(salt: bytes, secret: str) -> str:
    return hashlib.sha256(salt + secret.encode()).hexdigest()
