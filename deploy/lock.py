"""Writes ``constraints.txt``: the version of every package that Baton and its extras draw in, as pip resolves today.

python deploy/lock.py    run it when a dependency changes, in the oldest supported Python; then run all tests
"""

from __future__ import annotations

import json
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
    done = subprocess.run([*resolve, f"{ROOT}[{EXTRAS}]"], stdout=subprocess.PIPE, check=True)
    chosen = (one["metadata"] for one in json.loads(done.stdout)["install"])
    # A local version (torch 2.13.0+cpu) is the builder's own: both the CPU's and CUDA's build satisfy the public one.
    lines = {f"{one['name'].lower()}=={one['version'].partition('+')[0]}" for one in chosen if one["name"] != "baton"}
    TARGET.write_text(HEAD + "\n".join(sorted(lines)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
