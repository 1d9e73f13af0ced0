"""What `python -m build` makes: everything that runs or is read beside the code is inside."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import baton

ROOT = Path(__file__).resolve().parents[3]
IN_BOTH = (
    "baton/py.typed", "baton/wire/inference_pb2.py", "baton/wire/inference_pb2.pyi", "baton/wire/inference_pb2_grpc.py",
    "deploy/monitoring/alerts.yaml", "deploy/monitoring/grafana/goodput.json", "deploy/kuberay/base/rayservice.yaml",
    "deploy/ray/on-prem.yaml", "deploy/ray/app/serve.yaml", "deploy/images/bin/ray-node", "engine/native/",
    "kvtransfer/codecs/codecs.cpp", "placement/data/",
)  # fmt: skip
CONTRACT = "proto/baton/v1/inference.proto"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Names in the sdist and the wheel, by "sdist" and "wheel", without the folder that an sdist begins with."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("made")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode != 0:
        pytest.skip("this is no git clone: what would be built is NOT known")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "bench/results/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(made)],
        cwd=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    (sdist,), (wheel,) = made.glob("*.tar.gz"), made.glob("*.whl")
    assert sdist.name == f"baton-{baton.__version__}.tar.gz"
    assert wheel.name == f"baton-{baton.__version__}-py3-none-any.whl"
    with tarfile.open(sdist) as archive, zipfile.ZipFile(wheel) as package:
        return {
            "sdist": {name.partition("/")[2] for name in archive.getnames()},
            "wheel": set(package.namelist()),
        }


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_what_runs_and_what_is_read_is_inside(kind: str, built: dict[str, set[str]]) -> None:
    for wanted in IN_BOTH:
        assert any(name.startswith(wanted) for name in built[kind]), wanted
    dashboards = {f"deploy/monitoring/grafana/{path.name}" for path in (ROOT / "deploy/monitoring/grafana").iterdir()}
    assert dashboards <= built[kind]
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    modules = {str(path.relative_to(ROOT)) for name in packages for path in (ROOT / name).rglob("*.py")}
    assert modules - built[kind] == set()


def test_the_contract_travels_with_both(built: dict[str, set[str]]) -> None:
    assert CONTRACT in built["sdist"]
    (found,) = (name for name in built["wheel"] if name.endswith("inference.proto"))
    assert found.endswith(f"share/baton/{CONTRACT}")


def test_nothing_else_is_in_the_wheel(built: dict[str, set[str]]) -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert {name.partition("/")[0] for name in built["wheel"]} - packages == {
        f"baton-{baton.__version__}.dist-info", f"baton-{baton.__version__}.data"
    }  # fmt: skip
