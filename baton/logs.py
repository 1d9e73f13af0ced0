"""Log lines of a process: text or one JSON object each, with the process and the request that they are about.

A request's task calls :func:`about` once; every line that it, its child tasks or its threads write then names the
request. What clients send is nobody's business here: lines hold ids, counts and times (docs/operations.md).
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import TextIO

from baton.config_observe import ObserveConfig

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
NOBODY: Mapping[str, str] = MappingProxyType({})
_about: ContextVar[Mapping[str, str]] = ContextVar("about", default=NOBODY)
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Loggers that write a line per request or connection of their own accord, without our ids.
_CHATTY = ("uvicorn.access", "asyncio")


def about(**ids: str) -> None:
    """Lines of this task from here on, and of tasks and threads it starts, carry ``ids``; empty ones are left out."""
    _about.set(MappingProxyType({**_about.get(), **{name: value for name, value in ids.items() if value}}))


def current() -> Mapping[str, str]:
    """What this task's lines carry."""
    return _about.get()


class TextFormatter(logging.Formatter):
    """One line for people; ids and extras in brackets at its end."""

    def __init__(self, process: str) -> None:
        super().__init__(TEXT.replace("%(name)s", f"{process} %(name)s"))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        fields = {**_about.get(), **_extras(record)}
        line = super().formatMessage(record)
        return f"{line} [{' '.join(f'{name}={value}' for name, value in fields.items())}]" if fields else line


class JsonFormatter(logging.Formatter):
    """One JSON object: time, level, logger, process, message, the request's ids, and what the caller gave as extra."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
            **_about.get(),
            **_extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(config: ObserveConfig, process: str, stream: TextIO | None = None) -> None:
    """Sends every line of this process to ``stream``, by default standard error. process: who writes, "decode d-1"."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(process) if config.log_format == "json" else TextFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.log_level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _OWN and name[0] != "_"}
