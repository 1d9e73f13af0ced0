"""What a wheel is made from: pinned versions that fit, files that exist, one version everywhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import baton

ROOT = Path(__file__).resolve().parents[3]
OUTSIDE = {"fuzz"}  # atheris has wheels for few Pythons; `make fuzz` installs it apart


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_dependency_is_pinned_to_a_version_that_it_allows(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    extras = project["project"]["optional-dependencies"]
    texts = [*project["project"]["dependencies"], *(one for name in set(extras) - OUTSIDE for one in extras[name])]
    requirements = [one for one in map(Requirement, texts) if one.name != "baton"]
    assert len(requirements) > 40
    for one in requirements:
        version = pinned.get(canonicalize_name(one.name))
        assert version is not None, f"run deploy/lock.py: {one.name} is not in constraints.txt"
        assert one.specifier.contains(version, prereleases=True), (str(one), version)


def test_extras_that_the_documentation_names_exist(project: dict[str, Any]) -> None:
    assert {"gpu", "dev", "bench", "otel"} <= set(project["project"]["optional-dependencies"])


def test_what_a_wheel_shall_hold_exists(project: dict[str, Any]) -> None:
    tools = project["tool"]["setuptools"]
    for package, patterns in tools["package-data"].items():
        for pattern in patterns:
            assert list((ROOT / package).glob(pattern)), (package, pattern)
    for patterns in tools["data-files"].values():
        assert all(list(ROOT.glob(pattern)) for pattern in patterns)
    assert {path.suffix for path in (ROOT / "baton" / "wire").glob("inference*")} >= {".py", ".pyi"}


def test_the_changelog_tells_of_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert versions[0] == baton.__version__
