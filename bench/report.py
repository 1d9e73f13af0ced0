"""Where figures go: one JSON file a benchmark, with the date, the machine and the command that gave them."""

from __future__ import annotations

import json
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import Any

from bench import machine

FOLDER = Path(__file__).parent / "results"


def save(name: str, result: Any) -> Path:
    """Writes ``result`` to ``bench/results/NAME.json`` and prints the path."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    arguments = shlex.join(sys.argv[1:])
    tree = {
        "date": date.today().isoformat(),
        "command": f"python -m bench.{Path(sys.argv[0]).stem} {arguments}".strip(),
        "machine": machine.describe(),
        "result": result,
    }
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return path
