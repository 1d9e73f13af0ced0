"""Findings for people, line by line as they come, and for machines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from deploy.doctor.findings import Finding, exit_code

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
CHECK_CELLS = 18
INDENT = 6


def stream(findings: Iterable[Finding], console: Console) -> Iterator[Finding]:
    """Prints each finding as it comes and passes it on."""
    for finding in findings:
        console.print(
            Text.assemble(
                (f"{finding.status:<{INDENT}}", STYLES[finding.status]),
                (f"{finding.check:<{CHECK_CELLS}}", "bold"),
                f"{finding.subject}: {finding.found}",
            ),
            soft_wrap=True,
        )
        for label, text in (("why", finding.why), ("fix", finding.fix)):
            if text:
                console.print(
                    Text.assemble((f"{'':{INDENT}}{label}  ", "dim"), (text, "cyan" if label == "fix" else "")),
                    soft_wrap=True,
                )
        yield finding


def summary(findings: Iterable[Finding]) -> str:
    counts = {status: 0 for status in STYLES}
    for finding in findings:
        counts[finding.status] += 1
    return f"{counts['ok']} in order, {counts['warn']} to look at, {counts['fail']} wrong"


def as_json(findings: list[Finding]) -> str:
    return json.dumps({"exit_code": exit_code(findings), "findings": [asdict(one) for one in findings]}, indent=2)
