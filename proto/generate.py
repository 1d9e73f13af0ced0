"""Generates the Python stubs in ``baton/wire`` from ``proto/baton/v1``.

    python proto/generate.py           writes the stubs
    python proto/generate.py --check   exits with 1 if that would change a file

protoc places its output by the proto's path, ``baton/v1``, and the service stub imports its messages from there. The
stubs live flat in ``baton.wire`` instead, so the import is rewritten; the descriptor keeps the name
``baton/v1/inference.proto``, which clients see through reflection.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "proto"
WIRE = ROOT / "baton" / "wire"
PACKAGE = "baton/v1"


def generate() -> dict[str, str]:
    """File name -> text of every stub."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / PACKAGE).glob("*.proto"))
    with tempfile.TemporaryDirectory() as out:
        outputs = [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
        includes = [f"-I{PROTOS}", f"-I{files('grpc_tools') / '_proto'}"]
        if protoc.main(["protoc", *includes, *outputs, *sources]) != 0:
            raise SystemExit("protoc failed")
        return {path.name: _flatten(path.read_text(encoding="utf-8")) for path in sorted(Path(out, PACKAGE).iterdir())}


def _flatten(text: str) -> str:
    return text.replace(f"from {PACKAGE.replace('/', '.')} import ", "from baton.wire import ")


def _stale(stubs: dict[str, str]) -> list[str]:
    """Names of the stubs that are missing, differ, or have no proto any more."""
    present = {path.name: path.read_text(encoding="utf-8") for path in WIRE.glob("*_pb2*")}
    return sorted(name for name in stubs.keys() | present.keys() if stubs.get(name) != present.get(name))


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate baton/wire from proto/.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the stubs are not up to date")
    check: bool = parser.parse_args().check
    stubs = generate()
    stale = _stale(stubs)
    if check:
        for name in stale:
            print(f"baton/wire/{name} is not what proto/generate.py makes of proto/; run it", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        if name in stubs:
            (WIRE / name).write_text(stubs[name], encoding="utf-8")
        else:
            (WIRE / name).unlink()
        print(f"baton/wire/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
