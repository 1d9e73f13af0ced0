"""House rules that no other tool checks: what is importable, installed, generated, and that links lead somewhere."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


def test_proto_is_protoplus_even_from_the_root() -> None:
    done = python("import proto; print(proto.__file__)", ROOT)
    assert "site-packages" in done.stdout, done.stderr


def test_only_packages_are_packages() -> None:
    for folder in ("proto", "tests", "bench", "docs"):
        assert not list((ROOT / folder).rglob("__init__.py"))
    assert {"kernels", "shared"} & {path.name for path in ROOT.iterdir() if path.is_dir()} == set()


def test_every_package_is_named_wherever_packages_are_named(project: dict[str, Any]) -> None:
    tool = project["tool"]
    found = [name for name in tool["setuptools"]["packages"]["find"]["include"] if "." not in name]
    layers = next(contract for contract in tool["importlinter"]["contracts"] if contract["type"] == "layers")["layers"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    checked = re.search(r"^PACKAGES := (.*)$", makefile, re.MULTILINE)
    assert checked is not None
    assert sorted(found) == PACKAGES
    assert sorted(tool["importlinter"]["root_packages"]) == PACKAGES
    assert sorted(name for layer in layers for name in layer.split(" | ")) == PACKAGES
    assert sorted(checked[1].split()) == PACKAGES


def test_pure_modules_of_the_contract_exist(project: dict[str, Any]) -> None:
    forbidden = next(one for one in project["tool"]["importlinter"]["contracts"] if one["type"] == "forbidden")
    for name in forbidden["source_modules"]:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), name


def test_an_install_works_from_anywhere_and_brings_nothing_else(tmp_path: Path) -> None:
    if not any(one.metadata["Name"] == "baton" for one in importlib.metadata.distributions()):
        pytest.skip("baton is not installed here; `make setup` installs it")
    done = python(f"import {', '.join(PACKAGES)}; print(router.__file__)", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("tests", "bench", "docs"):
        done = python(f"import {name}; print(list({name}.__path__))", tmp_path)
        assert str(ROOT) not in done.stdout


@pytest.mark.parametrize("script", ["proto/generate.py", "docs/generate.py"])
def test_generated_files_are_current(script: str) -> None:
    done = subprocess.run(
        [sys.executable, script, "--check"],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_an_outdated_page_is_noticed(tmp_path: Path) -> None:
    copy = tmp_path / "docs" / "generate.py"
    copy.parent.mkdir()
    copy.write_text((ROOT / "docs" / "generate.py").read_text(encoding="utf-8"), encoding="utf-8")
    (copy.parent / "config.md").write_text("old", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(copy), "--check"],
        env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "config.md" in done.stderr


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "proto" / "README.md"]
    assert len(pages) >= 8
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_the_tour_names_things_that_exist() -> None:
    tour = (ROOT / "docs" / "life-of-a-request.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?)`", tour):
        assert (ROOT / path).exists(), path
    source = "\n".join(path.read_text(encoding="utf-8") for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
    for cls, member in re.findall(r"`([A-Z][A-Za-z]+)\.([a-zA-Z_]+)`", tour):
        assert re.search(rf"^class {cls}\b", source, re.MULTILINE), cls
        assert re.search(rf"^ +(?:async )?def {member}\(", source, re.MULTILINE), f"{cls}.{member}"
    for module, function in re.findall(r"`(?:router\.)?(policy|validate)\.([a-z_]+)`", tour):
        assert f"def {function}(" in (ROOT / "router" / f"{module}.py").read_text(encoding="utf-8"), function
