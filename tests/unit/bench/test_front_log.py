"""HAProxy's own lines, read back; the running HAProxy sends them where it is told."""

from __future__ import annotations

from bench.front_log import Served, parsed

GENERATE = (
    "<134>Nov 21 17:30:01 haproxy[991]: 127.0.0.1:50222 [21/Nov/2026:17:30:01.042] grpc_frontend "
    'grpc_overload/router-1 0/0/0/7/9 200 382 - - ---- 3/2/1/1/0 0/0 "POST http://127.0.0.1:9000'
    '/baton.v1.Inference/Generate HTTP/2.0"'
)


def test_a_refusal_is_an_answer_that_ends_as_it_begins() -> None:
    assert parsed([GENERATE]) == [Served(7, 9)]
    assert [one.refused for one in parsed([GENERATE])] == [True]


def test_a_stream_is_none() -> None:
    assert [one.refused for one in parsed([GENERATE.replace("/7/9 ", "/7/+950 ")])] == [False]


def test_nor_is_a_call_that_its_client_left() -> None:
    line = GENERATE.replace("0/0/0/7/9 200 382 - - ----", "0/0/0/-1/+12 -1 0 - - CD--")
    assert [one.refused for one in parsed([line])] == [False]


def test_other_lines_are_left_out() -> None:
    others = [GENERATE.replace("Generate", "GetStatus"), "Server grpc_overload/router-1 is UP", ""]
    assert parsed(others) == []
