"""Writes what deploy/monitoring/dashboards.py describes to ``grafana/*.json``.

python -m deploy.monitoring           writes the files
python -m deploy.monitoring --check   exits with 1 if that would change one
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from deploy.monitoring.dashboards import DASHBOARDS

FOLDER = Path(__file__).resolve().parent / "grafana"


def files() -> dict[str, str]:
    """Text of every dashboard's file by name."""
    return {f"{one.name}.json": json.dumps(one.drawn(), indent=1) + "\n" for one in DASHBOARDS}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the Grafana dashboards.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is not current")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to or to check")
    arguments = parser.parse_args()
    made = files()
    found = {path.name: path.read_text(encoding="utf-8") for path in arguments.out.glob("*.json")}
    if arguments.check:
        if found != made:
            print(f"{arguments.out} is not what deploy/monitoring/dashboards.py makes; run it", file=sys.stderr)
        return int(found != made)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, text in made.items():
        (arguments.out / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
