"""``baton keys create | list | revoke``: the file that ``security.api_keys_file`` names. Routers notice changes."""

from __future__ import annotations

import datetime
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from baton.errors import ConfigError, NotFound

keys_app = typer.Typer(help="API keys of clients.", no_args_is_help=True)

File = Annotated[
    Path | None, typer.Option("--file", help="File with the keys; by default security.api_keys_file of --config.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file; see docs/config.md.")]
PerMinute = Annotated[int | None, typer.Option(min=0, help="Of all keys of this tenant together; 0: unlimited.")]


@keys_app.command("create")
def create(
    tenant: Annotated[str, typer.Argument(help="Whose key it is. Keys of one tenant share its limits.")],
    *,
    file: File = None,
    config: ConfigFile = None,
    operator: Annotated[bool, typer.Option("--operator", help="May also read /metrics and the status.")] = False,
    requests_per_minute: PerMinute = None,
    tokens_per_minute: PerMinute = None,
) -> None:
    """Print a new key, once: only its hash is kept. Limits given here hold for all keys of the tenant from now on."""
    from baton.api_keys import Keyring, TenantLimits, issue

    with _changing(_path(file, config)) as change:
        before = change.ring.tenants.get(tenant, TenantLimits())
        limits = TenantLimits(
            before.requests_per_minute if requests_per_minute is None else requests_per_minute,
            before.tokens_per_minute if tokens_per_minute is None else tokens_per_minute,
        )
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        text, kept = issue(tenant, created=today, operator=operator, limits=limits)
        others = [key.limited(limits) if key.tenant == tenant else key for key in change.ring.keys]
        change.ring = Keyring([*others, kept])
    print(text)


@keys_app.command("list")
def show(file: File = None, config: ConfigFile = None) -> None:
    """Print the keys' ids, tenants and limits. The keys themselves are nowhere."""
    from router.gate import read_keys

    table = Table("id", "tenant", "created", "operator", "requests/min", "tokens/min", box=None)
    for key in read_keys(_path(file, config)).keys:
        limits = [str(limit) if limit else "-" for limit in (key.requests_per_minute, key.tokens_per_minute)]
        table.add_row(key.id, key.tenant, key.created, "yes" if key.operator else "-", *limits)
    Console().print(table)


@keys_app.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(help="Id of a key (bt-ID-...), or with --tenant the name of one.")],
    *,
    file: File = None,
    config: ConfigFile = None,
    tenant: Annotated[bool, typer.Option("--tenant", help="Revoke all keys of the tenant of that name.")] = False,
) -> None:
    """Take a key away. Routers refuse it within a second; streams that run end as they would have."""
    from baton.api_keys import Keyring

    with _changing(_path(file, config)) as change:
        left = [one for one in change.ring.keys if (one.tenant if tenant else one.id) != key]
        gone = len(change.ring.keys) - len(left)
        if not gone:
            raise NotFound("key", f"no {'tenant' if tenant else 'key'} of that name is in the file")
        change.ring = Keyring(left)
    typer.echo(f"revoked: {gone}", err=True)


def _path(file: Path | None, config: Path | None) -> Path:
    from baton.config import load

    named = load(config).security.api_keys_file if file is None else str(file)
    if not named:
        raise ConfigError("give --file, or a --config with security.api_keys_file", field="file")
    return Path(named).expanduser()


class _Change:
    """What is in the file, and after the block what is to be in it."""

    def __init__(self, path: Path) -> None:
        from baton.api_keys import Keyring
        from router.gate import read_keys

        self.ring = read_keys(path) if path.exists() else Keyring()


@contextmanager
def _changing(path: Path) -> Iterator[_Change]:
    """The file is replaced at once when the block ends well, and nobody else changes it meanwhile."""
    lock = path.with_name(f"{path.name}.lock")
    try:
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            change = _Change(path)
            yield change
            new = path.with_name(f"{path.name}.new")
            new.unlink(missing_ok=True)
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as opened:
                opened.write(change.ring.text())
                opened.flush()
                os.fsync(opened.fileno())
            new.rename(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", field="security.api_keys_file") from None
