"""The gate: who is let in, how keys come and go while it stands, and what it says to those it turns away."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from baton.api_keys import ANYBODY, Keyring, TenantLimits, issue
from baton.config import Config, parse
from baton.errors import ConfigError, Forbidden, Unauthenticated
from baton.secure import ClusterKey
from deploy import ingress
from router import gate as gate_module
from router.gate import FRONT_HEADER, Gate, front_token

KEY = ClusterKey("k" * 40)


def config(path: Path | None, **ingress_keys: object) -> Config:
    return parse({"security": {"api_keys_file": str(path or "")}, "ingress": ingress_keys})


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file without keys, looked at anew by every call."""
    monkeypatch.setattr(gate_module, "RELOAD_S", -1.0)
    path = tmp_path / "keys.jsonl"
    path.write_text("")
    return path


def test_without_a_file_anybody_may() -> None:
    gate = Gate(config(None), KEY)
    assert gate.admit({}) is ANYBODY
    assert gate.admit_operator({"authorization": "Bearer nonsense"}) is ANYBODY


def test_keys_come_and_go_without_a_restart(keys: Path) -> None:
    gate = Gate(config(keys), KEY)
    text, kept = issue("acme", created="2026-01-01", limits=TenantLimits(7))
    with pytest.raises(Unauthenticated, match="wrong or was revoked"):
        gate.admit(bearer(text))
    keys.write_text(Keyring([kept]).text())
    assert gate.admit(bearer(text)).tenant == "acme"
    assert gate.admit({"authorization": f"bearer  {text} ".encode()}).limits == TenantLimits(7)
    keys.write_text("")
    with pytest.raises(Unauthenticated):
        gate.admit(bearer(text))
    assert gate.refused == 2


def test_half_a_file_changes_nothing(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    text, kept = issue("acme", created="2026-01-01")
    keys.write_text(Keyring([kept]).text())
    gate = Gate(config(keys), KEY)
    keys.write_text(Keyring([kept]).text()[:-20])
    with caplog.at_level(logging.ERROR):
        assert gate.admit(bearer(text)).tenant == "acme"
    assert "line 1 is no key" in caplog.text
    keys.unlink()
    assert gate.admit(bearer(text)).tenant == "acme"
    with pytest.raises(ConfigError, match="cannot read"):
        Gate(config(keys), KEY)


def test_refusals_say_what_to_do_and_never_the_key(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate(config(keys), KEY)
    text, _ = issue("acme", created="2026-01-01")
    with pytest.raises(Unauthenticated, match="Authorization: Bearer KEY"):
        gate.admit({})
    for metadata in ({"authorization": text}, {"authorization": f"Basic {text}"}, bearer(text)):
        with pytest.raises(Unauthenticated) as refused:
            gate.admit(metadata)
        assert text not in str(refused.value)
    assert text not in caplog.text


def test_what_concerns_all_is_for_operators(keys: Path) -> None:
    tenants, tenant = issue("acme", created="2026-01-01")
    operators, operator = issue("ops", created="2026-01-01", operator=True)
    keys.write_text(Keyring([tenant, operator]).text())
    gate = Gate(config(keys), KEY)
    assert gate.admit_operator(bearer(operators)).tenant == "ops"
    with pytest.raises(Forbidden, match="operator"):
        gate.admit_operator(bearer(tenants))


def test_behind_tls_only_what_came_through_the_ingress_counts() -> None:
    gate = Gate(config(None, tls={"cert": "c", "key": "k"}), KEY)
    assert gate.admit({FRONT_HEADER: front_token(KEY)}) is ANYBODY
    for shown in ({}, {FRONT_HEADER: ""}, {FRONT_HEADER: front_token(ClusterKey("x" * 40))}, {FRONT_HEADER: "\xff"}):
        with pytest.raises(Unauthenticated, match="ingress"):
            gate.admit(shown)
    assert Gate(config(None), KEY).admit({}) is ANYBODY
    assert ingress.FRONT_HEADER == FRONT_HEADER
