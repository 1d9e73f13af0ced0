"""Coverage-guided fuzzing of one target, or of all in turn, with atheris: ``python tests/fuzz/fuzz.py [TARGET] -s 60``.

New inputs of interest go to a working folder, an input that fails is printed and kept as ``crash-*`` there; put one
that taught something into ``tests/fuzz/corpus/TARGET``, from where every test run replays it.
"""

from __future__ import annotations

import argparse
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MAX_INPUT_BYTES = 4096
INPUT_TIMEOUT_S = 20


def main() -> int:
    sys.path.insert(0, str(HERE.parents[1]))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", help="one of tests/fuzz/targets.py; by default each in turn")
    parser.add_argument("-s", "--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--keep", type=Path, help="working folder; by default a temporary one")
    options = parser.parse_args()
    if options.target is None:
        return _each(options.seconds)
    keep = options.keep or Path(tempfile.mkdtemp(prefix="baton-fuzz-"))
    keep.mkdir(parents=True, exist_ok=True)
    return _fuzz(options.target, options.seconds, keep)


def _each(seconds: int) -> int:
    """A process for each target: libFuzzer ends the one it runs in."""
    names = list(runpy.run_path(str(HERE / "targets.py"))["TARGETS"])
    failed = [name for name in names if subprocess.call([sys.executable, __file__, name, "-s", str(seconds)])]
    print(f"failed: {', '.join(failed)}" if failed else f"{len(names)} targets, no failure")
    return len(failed)


def _fuzz(target: str, seconds: int, keep: Path) -> int:
    import atheris

    with atheris.instrument_imports(include=["baton", "kvtransfer"]):
        run = runpy.run_path(str(HERE / "targets.py"))["TARGETS"][target]
    corpus = HERE / "corpus" / target
    arguments = [
        sys.argv[0], f"-max_total_time={seconds}", f"-max_len={MAX_INPUT_BYTES}", f"-timeout={INPUT_TIMEOUT_S}",
        f"-artifact_prefix={keep}/", "-rss_limit_mb=4096", "-print_final_stats=1", str(keep),
        *([str(corpus)] if corpus.is_dir() else []),
    ]  # fmt: skip
    atheris.Setup(arguments, run)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
