"""Writes ``constraints.txt``: the version of every package that Baton and its extras draw in, as pip resolves today.

python deploy/lock.py    run it when a dependency changes, in the oldest supported Python; then run all tests

From PyPI alone: its torch is CUDA's build, which wants one version of Triton and of every CUDA library. The CPU's build
wants none of them, so that it fits into the same file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "constraints.txt"
EXTRAS = "gpu,dev,bench,otel"
HEAD = """\
# Versions that Baton is tested with, by deploy/lock.py. Use: pip install --constraint constraints.txt .
"""


def main() -> None:
    resolve = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--report", "-"]
    elsewhere = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT")  # where this machine may have other builds
    environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
    environment["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run([*resolve, f"{ROOT}[{EXTRAS}]"], stdout=subprocess.PIPE, env=environment, check=True)
    chosen = (one["metadata"] for one in json.loads(done.stdout)["install"])
    lines = {f"{one['name'].lower()}=={one['version'].partition('+')[0]}" for one in chosen if one["name"] != "baton"}
    TARGET.write_text(HEAD + "\n".join(sorted(lines)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
