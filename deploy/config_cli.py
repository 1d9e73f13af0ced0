"""``baton config show | serve | env``: the configuration, and what Ray is told for it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

config_app = typer.Typer(help="The configuration, and what Ray is told for it.", no_args_is_help=True)

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file; see docs/config.md.")]


@config_app.command("show")
def show(config: ConfigFile = None) -> None:
    """Print the whole configuration as YAML, defaults included."""
    import yaml

    from baton.config import load

    print(yaml.safe_dump(load(config).model_dump(), sort_keys=False), end="")


@config_app.command("serve")
def serve(config: ConfigFile = None) -> None:
    """Print the Serve application as YAML, for `serve deploy` or a RayService. Takes a plan of `baton plan` as well."""
    import yaml

    from baton.config import load
    from deploy.serve_config import serve_config

    print(yaml.safe_dump(serve_config(load(config)), sort_keys=False), end="")


@config_app.command("env")
def env(
    *,
    config: ConfigFile = None,
    front: Annotated[Path | None, typer.Option(help="Put the hardened front into this folder, and name it.")] = None,
    tls: Annotated[
        Path | None, typer.Option(help="Folder with tls.crt and tls.key, instead of the files in ingress.tls.")
    ] = None,
) -> None:
    """Print what Ray's nodes need in their environment, as shell commands: run it on each before `ray start`."""
    from baton.config import load
    from deploy.serve_config import environment

    flags = {} if tls is None else {"ingress.tls.cert": str(tls / "tls.crt"), "ingress.tls.key": str(tls / "tls.key")}
    settings = load(config).with_flags(flags)
    found = environment(settings)
    if front is not None:
        from baton.secure import load_key
        from deploy import ingress
        from router.gate import front_token

        ingress.check(settings)
        key = load_key(settings.security)
        found |= ingress.install(settings, front.absolute(), front_token(key) if key is not None else "")
    for name, value in found.items():
        print(f"export {name}={shlex.quote(value)}")
