"""Which transports UCX really uses, read from what ``UCX_PROTO_INFO=y`` makes it write: a table per endpoint kind.

| d-fetch intra-node cfg#1                                         |
| remote memory read by ucp_get*(multi) into host memory from host |
+--------+-------------+-------------------------------------------+
| Range  | Description |                  Config                   |
| 0..inf | zero-copy   | cma/memory                                |
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"\| (?P<cells>.*\S) *\|\s*$")
_ENDPOINT = re.compile(r"(?P<agent>\S+) (?P<where>self|intra-node|inter-node|\S+) cfg#\d+$")
_RANGE = re.compile(r"(?P<low>\d+[KMG]?)(?:\.\.(?P<high>\d+[KMG]?|inf))?$")
_NAME_CHARS = 31  # UCX cuts an agent's name there
_COMPLAINT = re.compile(r"UCX\s+(WARN|ERROR|FATAL)\s+(?P<text>.*\S)")


@dataclass(frozen=True, slots=True)
class UcxPath:
    """How messages of some sizes travel between this agent and peers of one kind."""

    agent: str
    where: str  # "intra-node", "inter-node" or "self"
    operation: str  # "remote memory read by ucp_get*..."
    sizes: str  # "0..inf"
    protocol: str  # "zero-copy"
    transports: str  # "cma/memory", "rc_mlx5/mlx5_0:1"

    @property
    def is_read(self) -> bool:
        return self.operation.startswith("remote memory read")


def parse_paths(text: str) -> tuple[UcxPath, ...]:
    """Every path in UCX's output, in its order, each once; lines that are no table are skipped."""
    paths: dict[UcxPath, None] = {}
    agent = where = operation = ""
    for line in text.splitlines():
        if (found := _LINE.search(line)) is None:
            continue
        cells = [cell.strip() for cell in found["cells"].split(" | ")]
        if len(cells) == 1:
            endpoint = _ENDPOINT.match(cells[0])
            if endpoint is None:
                operation = cells[0]
            else:
                agent, where, operation = endpoint["agent"], endpoint["where"], ""
        elif len(cells) == 3 and operation and _RANGE.match(cells[0]):
            paths[UcxPath(agent, where, operation, *cells)] = None
    return tuple(paths)


def parse_complaints(text: str) -> tuple[str, ...]:
    """What UCX warned of, or worse, in its order."""
    return tuple(found["text"] for line in text.splitlines() if (found := _COMPLAINT.search(line)))


def describe(paths: tuple[UcxPath, ...], agent: str) -> str:
    """How ``agent`` reads from its peers, such as "cma/memory (intra-node, zero-copy)"; empty before its first read."""
    reads = dict.fromkeys(
        f"{path.transports} ({path.where}, {path.protocol})"
        for path in paths
        if path.agent == agent[:_NAME_CHARS] and path.is_read
    )
    return "; ".join(reads)
