"""What a wheel is made from: pinned versions that fit, files that exist, one version everywhere."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
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


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """Versions in the constraints, by their packages' canonical names."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_dependency_is_pinned_to_a_version_that_it_allows(project: dict[str, Any], pins: dict[str, str]) -> None:
    extras = project["project"]["optional-dependencies"]
    texts = [*project["project"]["dependencies"], *(one for name in set(extras) - OUTSIDE for one in extras[name])]
    requirements = [one for one in map(Requirement, texts) if one.name != "baton"]
    assert len(requirements) > 40
    for one in requirements:
        version = pins.get(canonicalize_name(one.name))
        assert version is not None, f"run deploy/lock.py: {one.name} is not in constraints.txt"
        assert one.specifier.contains(version, prereleases=True), (str(one), version)


# What PyPI's torch, CUDA's build, asks for (its METADATA); the CPU's build asks for none of it.
TORCH_CUDA = {
    "2.13.0": (
        "cuda-toolkit==13.0.3", "cuda-bindings<14,>=13.0.3", "nvidia-cudnn-cu13==9.20.0.48",
        "nvidia-cusparselt-cu13==0.8.1", "nvidia-nccl-cu13==2.29.7", "nvidia-nvshmem-cu13==3.4.5", "triton==3.7.1",
    )
}  # fmt: skip


def test_the_pins_fit_the_build_of_torch_that_computes_on_gpus(pins: dict[str, str]) -> None:
    for one in map(Requirement, TORCH_CUDA[pins["torch"]]):
        version = pins.get(canonicalize_name(one.name))
        assert version is not None, one
        assert one.specifier.contains(version), (str(one), version)


def test_the_pins_fit_each_other(pins: dict[str, str]) -> None:
    """What is installed here at its pinned version asks for nothing that the other pins exclude."""
    asked = 0
    for name, pin in pins.items():
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        if found.version.partition("+")[0] != pin:
            continue
        for one in map(Requirement, found.requires or ()):
            version = pins.get(canonicalize_name(one.name))
            if version is None or (one.marker is not None and not one.marker.evaluate({"extra": ""})):
                continue
            asked += 1
            assert one.specifier.contains(version, prereleases=True), (name, str(one), version)
    assert asked > 100


def test_setup_installs_what_was_tested() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "--constraint constraints.txt" in makefile
    assert len(re.findall(r"pip install", makefile)) == 1


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
