"""What UCX 1.23 writes with UCX_PROTO_INFO=y, and what is read from it."""

from __future__ import annotations

from kvtransfer.transports.ucx_report import UcxPath, describe, parse_complaints, parse_paths

WRITTEN = """\
[1795255366.362043] [vm:23648:0]   +-----------+--------------------+---------------------+
[1795255366.362043] [vm:23648:0]   | d-fetch intra-node cfg#1                          |
[1795255366.362043] [vm:23648:0]   | active message by ucp_am_send* from host memory   |
[1795255366.362043] [vm:23648:0]   +-----------+--------------------+---------------------+
[1795255366.362043] [vm:23648:0]   | Range     | Description        | Config              |
[1795255366.362043] [vm:23648:0]   |         0 | short              | tcp/lo              |
[1795255366.362043] [vm:23648:0]   | 1..16515  | zero-copy          | tcp/lo              |
[1795255366.362043] [vm:23648:0]   +--------+-------------+-------------------------------------------+
[1795255366.362043] [vm:23648:0]   | d-fetch inter-node cfg#2                                           |
[1795255366.362043] [vm:23648:0]   | remote memory read by ucp_get*(multi) into host memory from host   |
[1795255366.362043] [vm:23648:0]   +--------+-------------+-------------------------------------------+
[1795255366.362043] [vm:23648:0]   | Range       | Description | Config                               |
[1795255366.362043] [vm:23648:0]   | 0..16K      | zero-copy   | rc_mlx5/mlx5_0:1                     |
[1795255366.362043] [vm:23648:0]   | 16K..inf    | zero-copy   | 50% on rc_mlx5/mlx5_0:1, 50% on mlx5_1:1 |
[1795255366.100000] [vm:23648:0]     ucp_context.c:900  UCX  WARN  transport 'rdma' is not available
"""


def test_every_path_is_read_with_its_agent_peer_and_sizes() -> None:
    paths = parse_paths(WRITTEN + WRITTEN)
    assert len(paths) == 4
    assert paths[0] == UcxPath(
        "d-fetch", "intra-node", "active message by ucp_am_send* from host memory", "0", "short", "tcp/lo"
    )
    assert [path.sizes for path in paths if path.is_read] == ["0..16K", "16K..inf"]


def test_what_an_agent_reads_over_is_described_and_nothing_is_made_up() -> None:
    paths = parse_paths(WRITTEN)
    assert describe(paths, "d-fetch") == (
        "rc_mlx5/mlx5_0:1 (inter-node, zero-copy); 50% on rc_mlx5/mlx5_0:1, 50% on mlx5_1:1 (inter-node, zero-copy)"
    )
    assert describe(paths, "somebody-else") == ""
    assert describe(parse_paths("| a | b |\n|||\nno table"), "d-fetch") == ""


def test_complaints_are_found() -> None:
    assert parse_complaints(WRITTEN) == ("transport 'rdma' is not available",)
