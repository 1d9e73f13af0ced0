"""Images and the scripts inside: linted, pinned, not root; the scripts that need no Ray run here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
IMAGES = ROOT / "deploy" / "images"
SCRIPTS = sorted((IMAGES / "bin").iterdir())
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
HERE = Path(sys.executable).parent


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{HERE}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed: images are NOT linted")
    return found


def test_there_is_something_to_check() -> None:
    assert {path.name for path in SCRIPTS} == {"alive", "drain", "ray-node", "ready"}
    assert {path.name for path in DOCKERFILES} == {"cpu.Dockerfile", "cuda.Dockerfile"}


def test_dockerfiles_are_clean() -> None:
    done = subprocess.run([tool("hadolint"), *map(str, DOCKERFILES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_scripts_are_clean_and_executable() -> None:
    done = subprocess.run([tool("shellcheck"), *map(str, SCRIPTS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert all(os.access(path, os.X_OK) for path in SCRIPTS)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_images_are_built_in_stages_pinned_and_not_root(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    stages = re.findall(r"^FROM (\S+)(?: AS (\w+))?$", text, re.M)
    assert [name for _, name in stages] == ["build", ""]
    (base,) = re.findall(r"^ARG BASE=(\S+)$", text, re.M)
    assert re.fullmatch(r"[\w./-]+:\d[\w.-]+", base), base
    last = text[text.rindex("\nFROM ") :]
    assert "USER 1000:1000" in last
    assert last.index("USER 1000:1000") < last.index("ENTRYPOINT")
    assert "HEALTHCHECK" in last
    assert "--constraint constraints.txt" in text
    assert "wget" in last  # probes ask with it
    copied = set(re.findall(r"^COPY (\w+) \1$", text, re.M))
    assert copied == {path.parent.name for path in ROOT.glob("*/__init__.py")}


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{HERE}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(IMAGES / "bin" / script), *arguments],
        env={"PATH": path, "HOME": "/nonexistent", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_probes_fail_where_nothing_answers() -> None:
    assert run("alive", RAY_AGENT_PORT="1").returncode != 0
    for pool in ("head", "router", "prefill", "decode"):
        assert run("ready", pool, BATON_HTTP_PORT="1", RAY_DASHBOARD_PORT="1").returncode not in (0, 2)
    assert run("ready", "boss").returncode == 2
    assert run("ready").returncode != 0
