"""What the Dockerfiles do, without Docker: install from the constraints, start, probe, drain."""

from __future__ import annotations

import shutil
import subprocess
import venv
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]
NAMESPACES = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]


def run(*command: str, cwd: Path, timeout_s: float) -> str:
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_a_bare_environment_runs_what_an_image_runs(tmp_path: Path, model_folder: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACES, "true"], check=False).returncode != 0:
        pytest.skip("namespaces are not allowed here: the images' steps are NOT tested")
    source, bare = tmp_path / "source", tmp_path / "venv"
    run("git", "clone", "--quiet", str(ROOT), str(source), cwd=tmp_path, timeout_s=60)
    venv.create(bare, with_pip=True)
    install = [str(bare / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    run(*install, "--constraint", "constraints.txt", ".[otel]", cwd=source, timeout_s=900)
    version = run(
        str(bare / "bin" / "python"), "-c", "import torch; print(torch.__version__)", cwd=tmp_path, timeout_s=60
    )
    assert version.startswith("2.13.0")
    work = Path("/tmp") / f"bn-{tmp_path.name[-8:]}"  # sockets of Ray lie deep below it: a short name
    work.mkdir()
    try:
        script = Path(__file__).with_name("bare_node.sh")
        told = run(*NAMESPACES, str(script), str(bare), str(source), str(work), str(model_folder.parent), cwd=work,
                   timeout_s=280)  # fmt: skip
    finally:
        shutil.rmtree(work, ignore_errors=True)
    assert told.splitlines()[-1] == "started, ready, answered, drained"
