"""API keys: what is kept cannot be used, what is presented is found or not, and a bad line is named."""

from __future__ import annotations

import json
import time

import pytest

from baton.api_keys import Caller, Keyring, TenantLimits, issue
from baton.errors import ConfigError

TODAY = "2026-01-31"


def test_a_key_opens_and_its_line_holds_nothing_that_would() -> None:
    text, kept = issue("acme", created=TODAY, limits=TenantLimits(60, 1000))
    ring = Keyring.parse(Keyring([kept]).text())
    assert ring.find(text) == Caller("acme", TenantLimits(60, 1000))
    line = ring.text()
    secret = text.split("-", 2)[2]
    assert secret not in line
    assert kept.id in text
    again, other = issue("acme", created=TODAY)
    assert (kept.salt, kept.sha256, kept.id) != (other.salt, other.sha256, other.id)
    assert again != text


def test_what_is_not_the_key_is_nobodys() -> None:
    text, kept = issue("acme", created=TODAY)
    other, _ = issue("other", created=TODAY)
    ring = Keyring([kept])
    swapped = f"bt-{kept.id}-{other.split('-', 2)[2]}"
    flipped = text[:-1] + ("A" if text[-1] != "A" else "B")
    wrong = [
        "",
        "bt-",
        text[:-1],
        text + "x",
        f" {text}",
        text.upper(),
        other,
        swapped,
        flipped,
        kept.sha256,
        "bt-" * 99,
    ]
    for presented in [*wrong, f"bt-{kept.id}-{kept.sha256[:43]}", text + "\n", "é" * 55]:
        assert ring.find(presented) is None, presented
    assert Keyring().find(text) is None


def test_unknown_ids_take_as_long_as_wrong_secrets() -> None:
    """Both hash and compare; the faster of many runs differ by far less than a hash's time would show."""
    _, kept = issue("acme", created=TODAY)
    ring = Keyring([kept])
    known, unknown = f"bt-{kept.id}-{'a' * 43}", f"bt-AAAAAAAA-{'a' * 43}"

    def fastest(presented: str) -> float:
        times = []
        for _ in range(3000):
            began = time.perf_counter()
            ring.find(presented)
            times.append(time.perf_counter() - began)
        return min(times)

    assert fastest(unknown) > 0.5 * fastest(known)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tenant": "a b"}, "line 2 is no key: tenant"),
        ({"salt": "00"}, "line 2 is no key: salt"),
        ({"sha256": None}, "line 2 is no key: sha256"),
        ({"requests_per_minute": -1}, "line 2 is no key: requests_per_minute"),
        ({"colour": "red"}, "line 2 is no key: colour"),
        ({"created": "yesterday"}, "line 2 is no key: created"),
    ],
)
def test_a_bad_line_is_named(change: dict[str, object], named: str) -> None:
    good, bad = issue("acme", created=TODAY)[1], issue("beta", created=TODAY)[1]
    text = Keyring([good]).text() + json.dumps(bad.model_dump() | change) + "\n"
    with pytest.raises(ConfigError, match=named) as wrong:
        Keyring.parse(text)
    assert wrong.value.field == "security.api_keys_file"
    with pytest.raises(ConfigError, match="line 1 is no key"):
        Keyring.parse("{")


def test_one_id_and_one_tenants_limits_once() -> None:
    _, first = issue("acme", created=TODAY)
    _, second = issue("acme", created=TODAY, limits=TenantLimits(5))
    with pytest.raises(ConfigError, match="two keys have the id"):
        Keyring([first, first])
    with pytest.raises(ConfigError, match="different limits"):
        Keyring([first, second])
    with pytest.raises(ConfigError, match="no name of a tenant"):
        issue("-", created=TODAY)
