"""Small text files that a configuration names: read whole, within a bound, their faults told by the key's name."""

from __future__ import annotations

from pathlib import Path

from baton.errors import ConfigError


def read_text(path: Path, *, field: str, most_bytes: int) -> str:
    """The file's text. Raises :class:`ConfigError` for ``field``: unreadable, no UTF-8, above ``most_bytes``."""
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field=field) from None
    if len(data) > most_bytes:
        raise ConfigError(f"{path} is larger than {most_bytes} bytes", field=field)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text", field=field) from None
