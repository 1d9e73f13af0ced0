"""What the doctor says: one finding per check and subject."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]
HEALTHY, SICK = 0, 1  # exit codes; CANNOT_RUN when nothing could be examined
CANNOT_RUN = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """``why`` it matters and ``fix``, a command or a setting, are empty for what is in order."""

    check: str
    subject: str
    status: Status
    found: str
    why: str = ""
    fix: str = ""


def ok(check: str, subject: str, found: str) -> Finding:
    return Finding(check, subject, "ok", found)


def warn(check: str, subject: str, found: str, *, why: str, fix: str) -> Finding:
    return Finding(check, subject, "warn", found, why, fix)


def fail(check: str, subject: str, found: str, *, why: str, fix: str) -> Finding:
    return Finding(check, subject, "fail", found, why, fix)


def exit_code(findings: Iterable[Finding]) -> int:
    """1 when anything fails; warnings alone are 0, so that CI stops for what cannot work and nothing else."""
    return SICK if any(finding.status == "fail" for finding in findings) else HEALTHY
