"""The command line: ``baton up | down | status | doctor | generate | chat | model | config | codec | keys``.

Answers go to standard output, everything about them (progress, ledgers, errors) to standard error. Exit codes: 0 done,
1 the service failed, 2 the input or the configuration is wrong, 130 interrupted. Ray and torch are imported only by
the commands that need them, so that clients start at once.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from baton.errors import BatonError, ConfigError, InvalidRequest, NotFound
from deploy.codec_cli import codec_app
from deploy.config_cli import config_app
from deploy.keys_cli import keys_app
from deploy.reach import Address, ApiKeyFile, Name, Reach, TlsCa, TlsCert, TlsKey, UseTls

if TYPE_CHECKING:
    from baton.config import Config
    from deploy.talk import Answer

ANSWER_TOKENS = 256

PLANNER_COMMANDS = ("plan", "workload", "profile", "tables")

app = typer.Typer(
    help="Prefill and decode on separate workers.",
    epilog=f"Planner: {', '.join(PLANNER_COMMANDS)}. See docs/planner.md.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
model_app = typer.Typer(help="Models on this machine.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.add_typer(config_app, name="config")
app.add_typer(codec_app, name="codec")
app.add_typer(keys_app, name="keys")

RayAddress = Annotated[str | None, typer.Option("--address", help="host:port of a Ray that runs already, or auto.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file; see docs/config.md.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")]
Seed = Annotated[int | None, typer.Option(help="Makes the random draws repeatable.")]
Codec = Annotated[str | None, typer.Option(help="auto, raw, lossless, int8, int4-zstd ...: docs/codecs.md.")]
System = Annotated[str | None, typer.Option(help="System message of the conversation.")]
Timeout = Annotated[float, typer.Option(help="Seconds that one answer may take.")]


@app.command()
def up(
    *,
    name: Annotated[str | None, typer.Option(help="Name of the cluster.")] = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill workers; 0 decodes and prefills in one pool.")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers.")] = None,
    model: Annotated[str | None, typer.Option(help="Model name, Hugging Face folder or id, or .gguf file.")] = None,
    config: ConfigFile = None,
    transport: Annotated[str | None, typer.Option(help="nixl or tcp.")] = None,
    codec: Codec = None,
    quality_floor: Annotated[str | None, typer.Option(help="exact, or the lossiest level allowed.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of the gRPC endpoint.")] = None,
    http_port: Annotated[int | None, typer.Option(help="Port of the HTTP endpoint.")] = None,
    address: RayAddress = None,
) -> None:
    """Start a local cluster in the background, or deploy on a Ray that runs, and print the endpoints."""
    flags = {
        "name": name,
        "prefill.replicas": prefill,
        "decode.replicas": decode,
        "model.id": model,
        "handoff.transport": transport,
        "handoff.codec": codec,
        "handoff.quality_floor": quality_floor,
        "ingress.grpc_port": grpc_port,
        "ingress.http_port": http_port,
    }
    settings = _config(config, flags)
    if address is not None:
        from deploy import existing

        existing.up(settings, address, progress=_note)
        host = settings.ingress.host
        http = f"{_scheme(settings)}://{host}:{settings.ingress.http_port}/v1"
        print(f"gRPC  {host}:{settings.ingress.grpc_port}\nHTTP  {http}")
        return
    from deploy import local

    endpoints = local.up(settings, progress=_note)
    print(f"gRPC  {endpoints.grpc}\nHTTP  {_scheme(settings)}://{endpoints.http}/v1\nlogs  {endpoints.log_dir}")


@app.command()
def down(name: Name = "baton", address: RayAddress = None) -> None:
    """End the local cluster, or the application on a Ray that runs: only what `up` started."""
    from deploy import existing, local

    ended = local.down(name, progress=_note) if address is None else existing.down(name, address)
    _note(f"{name} has ended" if ended else f"no cluster named {name} is running")


@app.command()
def status(
    *,
    name: Name = "baton",
    address: Address = None,
    api_key_file: ApiKeyFile = None,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Show pools, workers, what they hold, and the transport."""
    from deploy import draw

    with Reach(name, address, api_key_file, tls_ca, tls_cert, tls_key, tls).client() as client:
        Console().print(draw.status(client.status()))


@app.command()
def doctor(
    *,
    name: Annotated[str | None, typer.Option(help="Examine this running local cluster.")] = None,
    address: Annotated[str | None, typer.Option(help="host:port of a gRPC endpoint: examine its cluster.")] = None,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    api_key_file: ApiKeyFile = None,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Find out what is wrong here or with a running cluster, and what mends it. Exit code 1: something is wrong."""
    from deploy.doctor import examine, findings, show

    try:
        if name is None and address is None:
            source = examine.machine(config)
        else:
            reach = Reach(name or "baton", address, api_key_file, tls_ca, tls_cert, tls_key, tls)
            source = examine.running(reach, config)
        found = list(source if as_json else show.stream(source, Console(highlight=False)))
    except BatonError as error:
        _note(f"error: {error}")
        raise typer.Exit(findings.CANNOT_RUN) from None
    print(show.as_json(found) if as_json else show.summary(found))
    raise typer.Exit(findings.exit_code(found))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads standard input.")],
    *,
    name: Name = "baton",
    address: Address = None,
    max_tokens: MaxTokens = ANSWER_TOKENS,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be given often.")] = None,
    codec: Codec = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it stands, without chat template.")] = False,
    system: System = None,
    timeout: Timeout = 600.0,
    api_key_file: ApiKeyFile = None,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Stream one answer, then draw where its time went."""
    from baton.client import Options
    from deploy import talk

    text = sys.stdin.read() if prompt == "-" else prompt
    options = Options(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop,
        codec=codec,
        timeout_s=timeout,
    )
    with Reach(name, address, api_key_file, tls_ca, tls_cert, tls_key, tls).client() as client:
        if raw:
            parts = client.stream(text, **options)
        else:
            parts = client.stream_chat([*talk.opening(system), ("user", text)], **options)
        _show(talk.stream(parts, sys.stdout))


@app.command()
def chat(
    *,
    name: Name = "baton",
    address: Address = None,
    max_tokens: MaxTokens = ANSWER_TOKENS,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    codec: Codec = None,
    system: System = None,
    timeout: Timeout = 600.0,
    api_key_file: ApiKeyFile = None,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Talk with the model; an empty line or Ctrl-D ends, Ctrl-C stops an answer."""
    from baton.client import Options
    from deploy import talk

    options = Options(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, codec=codec, timeout_s=timeout
    )
    turns = talk.opening(system)
    with Reach(name, address, api_key_file, tls_ca, tls_cert, tls_key, tls).client() as client:
        while text := _ask():
            try:
                answer = talk.stream(client.stream_chat([*turns, ("user", text)], **options), sys.stdout)
            except KeyboardInterrupt:
                _note("\nstopped; this turn is forgotten")
            except BatonError as error:
                _note(f"error: {error}; this turn is forgotten")
            else:
                turns += [("user", text), ("assistant", answer.text)]
                _show(answer)


@model_app.command("pull")
def pull(
    model: Annotated[str | None, typer.Argument(help="Model name, Hugging Face id, or .gguf file.")] = None,
    config: ConfigFile = None,
) -> None:
    """Fetch and convert a model, so that workers find it, and print its folder."""
    from deploy import draw
    from engine import hub

    settings = _config(config, {"model.id": model})
    with draw.fetching(_notes()) as report:
        folder = hub.resolve(settings.model.id, settings.model.cache_dir, report)
    print(folder)


def main(argv: Sequence[str] | None = None) -> None:
    """The console script. Every expected failure is one line on standard error and an exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments and arguments[0] in PLANNER_COMMANDS:
        _add_planner()
    try:
        app(args=arguments, prog_name="baton")
    except BatonError as error:
        _note(f"error: {error}")
        sys.exit(2 if isinstance(error, InvalidRequest | NotFound | ConfigError) else 1)


def _add_planner() -> None:
    """The planner's commands; they bring NumPy along, which clients do not wait for."""
    from placement import cli, profile_cli

    app.command("plan")(cli.plan)
    app.add_typer(cli.workload_app, name="workload")
    app.command("profile")(profile_cli.profile)
    app.command("tables")(profile_cli.convert_tables)


def _config(path: Path | None, flags: Mapping[str, object]) -> Config:
    from baton.config import load

    return load(path).with_flags(dict(flags))


def _scheme(config: Config) -> str:
    return "https" if config.ingress.tls.on else "http"


def _show(answer: Answer) -> None:
    from deploy import draw

    notes = _notes()
    notes.print(draw.stage_ledger(answer.ledger, width=min(draw.BAR_CELLS, notes.width)))
    per_s = answer.tokens_per_s
    rate = f", {per_s:.1f} tokens/s after the first" if per_s else ""
    notes.print(
        f"{answer.prompt_tokens} + {answer.completion_tokens} tokens, ended by {answer.finish}{rate}", style="dim"
    )


def _ask() -> str:
    """The next line of the conversation; empty when it is over."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() history and editing
    try:
        return input("\n> ").strip()
    except EOFError:
        return ""


def _notes() -> Console:
    return Console(stderr=True, highlight=False)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
