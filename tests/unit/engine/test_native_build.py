"""The kernels are compiled once, found again, shared by workers that start at once, and missed with a reason."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from baton import native
from engine.build import load_model
from engine.model import Model
from engine.native import build, ops
from engine.native.library import Library
from engine.ops import TorchOps

if TYPE_CHECKING:
    from tests.unit.engine.conftest import Harness


@pytest.mark.usefixtures("compiler")
def test_found_again_without_a_compiler_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.library(tmp_path)
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled twice"))
    assert build.library(tmp_path) == first
    assert {path.name for path in tmp_path.iterdir()} == {first.with_suffix(".lock").name, first.name}
    assert Library(first).panel % 8 == 0


@pytest.mark.usefixtures("compiler")
def test_workers_that_start_at_once_build_once(tmp_path: Path) -> None:
    code = (
        "import logging, pathlib, sys; logging.basicConfig(level=logging.INFO); from engine.native import build; "
        "print(build.library(pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    workers = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
        )
        for _ in range(2)
    ]
    answers = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], answers
    assert len({out for out, _ in answers}) == 1
    assert sum(log.count("compiled kernels.cpp in") for _, log in answers) == 1


def test_no_compiler_names_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match="install"):
        build.library(tmp_path, compilers=("no-such-compiler",))


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'disk on fire' >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(build.BuildError, match="disk on fire"):
        build.library(tmp_path / "cache", compilers=(str(broken),))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(build.BuildError, match="cannot build in"):
        build.library(tmp_path / "cache")


@pytest.mark.usefixtures("compiler")
def test_a_cache_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(build.BuildError, match="cannot build in"):
        build.library(tmp_path / "file" / "cache")


def test_without_a_library_torch_computes_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> Path:
        raise build.BuildError("no C++ compiler; install one")

    monkeypatch.setattr(build, "library", missing)
    assert ops.native_ops(64, 1) is None
    assert "install one" in caplog.text


@pytest.mark.usefixtures("compiler")
def test_threads_come_from_torchs_own_runtime() -> None:
    """One OpenMP runtime in the process: a second one would start threads that fight with torch's for the cores."""
    Library(build.library())
    torch.ones(1)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}) <= 1


def test_without_a_compiler_a_model_still_generates_and_the_log_says_why(
    tiny_folder: Path, tiny: Model, harness: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work = harness.work("r", harness.prompt(20))
    expected = harness.alone(tiny, work)
    monkeypatch.setattr("shutil.which", lambda name: None)
    model = load_model(tiny_folder, "float32", 1)
    assert isinstance(model.ops, TorchOps)
    assert "plain torch computes" in caplog.text
    assert "no C++ compiler; install one" in caplog.text
    assert harness.alone(model, work) == expected
