"""``baton keys``: what it writes opens the gate, and what it revokes does not."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from baton.api_keys import TenantLimits
from deploy.cli import main
from deploy.reach import Reach
from router.gate import read_keys


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["keys", *arguments])
    return int(str(ended.value.code or 0))


def created(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run("create", *arguments) == 0
    return capsys.readouterr().out.strip()


def test_a_key_is_made_listed_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    text = created(capsys, "acme", "--file", str(file), "--requests-per-minute", "60")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = created(capsys, "acme", "--file", str(file), "--tokens-per-minute", "1000")
    for key in (text, again):  # limits are the tenant's, and those not given stay
        caller = read_keys(file).find(key)
        assert caller is not None
        assert caller.limits == TenantLimits(60, 1000)
        assert not caller.operator
    ops = created(capsys, "ops", "--operator", "--file", str(file))
    assert run("list", "--file", str(file)) == 0
    listed = capsys.readouterr().out
    assert "acme" in listed
    assert "1000" in listed
    assert text not in listed
    assert run("revoke", text.split("-")[1], "--file", str(file)) == 0
    assert read_keys(file).find(text) is None
    assert read_keys(file).find(again) is not None
    assert run("revoke", "acme", "--tenant", "--file", str(file)) == 0
    caller = read_keys(file).find(ops)
    assert caller is not None
    assert caller.operator
    assert run("revoke", "acme", "--tenant", "--file", str(file)) == 2
    assert "no tenant of that name" in capsys.readouterr().err


def test_the_configuration_may_name_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, config = tmp_path / "keys", tmp_path / "c.yaml"
    config.write_text(f"security: {{api_keys_file: {file}}}")
    text = created(capsys, "acme", "--config", str(config))
    assert read_keys(file).find(text) is not None
    assert run("list") == 2
    assert "security.api_keys_file" in capsys.readouterr().err
    assert run("create", "a b", "--file", str(file)) == 2
    file.write_text("nonsense")
    assert run("create", "acme", "--file", str(file)) == 2
    assert file.read_text() == "nonsense", "a file that is not understood is not replaced"


def test_two_at_once_lose_no_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda number: run("create", f"t{number}", "--file", str(file)), range(16))) == {0}
    assert len(read_keys(file).keys) == 16
    capsys.readouterr()


def test_the_client_takes_its_key_and_authority_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "key"
    key.write_text("bt-x\n")
    monkeypatch.setenv("BATON_API_KEY", "from the environment")
    assert Reach("n", "h:1", key)._api_key() == "bt-x"
    assert Reach("n", "h:1")._api_key() == "from the environment"
    assert Reach("n", "h:1")._tls(wanted=False) is None
    assert Reach("n", "h:1")._tls(wanted=True) is not None
    tls = Reach("n", "h:1", tls_ca=key)._tls(wanted=False)
    assert tls is not None
    assert tls.ca == key
