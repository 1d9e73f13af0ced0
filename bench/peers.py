"""Baton beside vLLM on this machine, in turns: `python -m bench.peers whole|pd --peers DIR --scripts ../shared/peers`.

DIR is what `setup.sh DIR` of the scripts built. Every round starts one side, loads it, ends it, then the other: a noisy
hour disturbs both alike. Both get the same closed loop: prompts of 512 token ids, 64 outputs, greedy, concurrency 1, 4
and 8. Medians over the rounds; a ratio above 1 says that Baton is better.

whole: both cores in one server. pd: a prefill worker on core 0, a decode worker on core 1. The peer runs in the dtype
that `--dtype` names; where the CPU has no bfloat16 instructions float32 is its faster one, so that is the default.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from baton.config import Config
from bench import report
from bench.closed import Row, load
from deploy import local

CONCURRENCY = (1, 4, 8)
START_TIMEOUT_S = 300.0
LOAD_TIMEOUT_S = 1800.0
STOP_TIMEOUT_S = 20.0
LINE = re.compile(
    r"c=(\d+) done (\d+)/(\d+)\s+TTFT p50 ([\d.]+) p99 [\d.]+ ms\s+TPOT p50 ([\d.]+) ms\s+out ([\d.]+) tok/s"
)
SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {"prefill.replicas": 0, "decode.replicas": 1, "decode.threads": 2},
    "pd": {"prefill.threads": 1, "decode.threads": 1, "prefill.pin": True, "decode.pin": True},
}
PORTS = {"whole": 18100, "pd": 18200}

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Peer:
    """vLLM as the scripts run it."""

    folder: Path
    scripts: Path
    setting: str
    dtype: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{PORTS[self.setting]}"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        log = self.folder / f"{self.setting}.log"
        with tempfile.TemporaryDirectory() as copy, log.open("w") as out:
            scripts = Path(shutil.copytree(self.scripts, copy, dirs_exist_ok=True, copy_function=shutil.copyfile))
            whole = scripts / "whole.sh"
            whole.write_text(whole.read_text().replace("--dtype bfloat16", f"--dtype {self.dtype}"))
            whole.chmod(0o755)
            command = ["bash", str(scripts / f"{self.setting}.sh"), str(self.folder)]
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
            try:
                self._wait(process, log)
                yield
            finally:
                _end(process)

    def _wait(self, process: subprocess.Popen[bytes], log: Path) -> None:
        """pd.sh says when it is ready; the whole server answers its health check."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and process.poll() is None:
            if self.setting == "pd" and "ready:" in log.read_text():
                return
            if self.setting == "whole" and _healthy(f"{self.url}/health"):
                return
            time.sleep(0.5)
        raise RuntimeError(f"the peer did not start; see {log}")

    def load(self) -> list[Row]:
        """One pass of the scripts' own load generator."""
        python, script = self.folder / "vllm" / "bin" / "python", self.scripts / "load.py"
        levels = ",".join(map(str, CONCURRENCY))
        done = subprocess.run(
            [python, script, self.url, "smollm2", self.folder / "model", "--repeat", "1", "--concurrency", levels],
            capture_output=True, text=True, timeout=LOAD_TIMEOUT_S, check=True,
        )  # fmt: skip
        rows = [
            Row(int(c), int(d), int(a), float(t), float(p), float(o)) for c, d, a, t, p, o in LINE.findall(done.stdout)
        ]
        if [row.concurrency for row in rows] != list(CONCURRENCY):
            raise RuntimeError(f"the peer's load generator printed {done.stdout!r} {done.stderr!r}")
        return rows


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """The script and everything it started."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    _, stubborn = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    for member in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def ours(setting: str) -> list[Row]:
    """One pass over a fresh local cluster."""
    config = Config().with_flags({"name": f"peers-{setting}", **SETTINGS[setting]})
    endpoints = local.up(config, progress=lambda line: None)
    try:
        return asyncio.run(load(endpoints.grpc, CONCURRENCY))
    finally:
        local.down(config.name, progress=lambda line: None)


def compare(setting: str, peers: Path, scripts: Path, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """One row per concurrency: both sides' medians, and the ratios."""
    seen: dict[str, list[list[Row]]] = {"vllm": [], "baton": []}
    peer = Peer(peers, scripts, setting, dtype)
    for number in range(rounds):
        with peer.running():
            seen["vllm"].append(peer.load())
        seen["baton"].append(ours(setting))
        for name, passes in seen.items():
            for row in passes[-1]:
                print(f"round {number + 1} {dtype:8s} {name:5s} {row}", flush=True)
    return [_row(index, seen) for index in range(len(CONCURRENCY))]


def _row(index: int, seen: dict[str, list[list[Row]]]) -> dict[str, Any]:
    middle = {name: _median([rows[index] for rows in passes]) for name, passes in seen.items()}
    theirs, own = middle["vllm"], middle["baton"]
    return {
        "concurrency": CONCURRENCY[index],
        **{name: asdict(row) for name, row in middle.items()},
        "ttft_ratio": theirs.ttft_ms / own.ttft_ms,
        "tpot_ratio": theirs.tpot_ms / own.tpot_ms,
        "output_ratio": own.output_tokens_s / theirs.output_tokens_s,
    }


def _median(rows: list[Row]) -> Row:
    first = rows[0]
    figures = (
        statistics.median(getattr(row, name) for row in rows) for name in ("ttft_ms", "tpot_ms", "output_tokens_s")
    )
    return Row(first.concurrency, min(row.done for row in rows), first.asked, *figures)


@app.command()
def main(
    setting: Annotated[str, typer.Argument(help="whole or pd")],
    peers: Annotated[Path, typer.Option(help="What setup.sh built.")],
    scripts: Annotated[Path, typer.Option(help="Folder of setup.sh, whole.sh, pd.sh and load.py.")],
    dtype: Annotated[str, typer.Option(help="dtype of the peer.")] = "float32",
    rounds: Annotated[int, typer.Option(help="Passes of each side.")] = 5,
) -> None:
    if setting not in SETTINGS:
        raise typer.BadParameter(f"is {setting!r}, allowed: {', '.join(SETTINGS)}", param_hint="setting")
    rows = compare(setting, peers.resolve(), scripts.resolve(), dtype, rounds)
    for row in rows:
        ratios = ", ".join(f"{name} {row[f'{name}_ratio']:.2f}x" for name in ("ttft", "tpot", "output"))
        print(f"{setting} vllm {dtype}, concurrency {row['concurrency']}: {ratios}")
    report.save(f"peers-{setting}-{dtype}", {"rounds": rounds, "rows": rows})


if __name__ == "__main__":
    app()
