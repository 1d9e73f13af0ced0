"""The ledger's bar and the status table, drawn on a console that records."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, RenderableType

from baton.ledger import STAGES, Ledger, close
from baton.wire import inference_pb2 as pb
from deploy import draw

SECONDS = st.floats(min_value=0.0, max_value=1e4, allow_nan=False)


def drawn(what: RenderableType, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(what)
    return out.getvalue()


@given(st.dictionaries(st.sampled_from(STAGES), SECONDS), st.integers(1, 200))
def test_cells_sum_to_the_width_and_follow_the_seconds(stages: dict[str, float], width: int) -> None:
    counts = draw.cells(stages, width)
    total_s = sum(stages.values())
    assert counts.keys() == stages.keys()
    assert sum(counts.values()) == (width if total_s > 0.0 else 0)
    for name, seconds in stages.items():
        exact = seconds / total_s * width if total_s > 0.0 else 0.0
        assert abs(counts[name] - exact) < 1.0 + 1e-6
        assert seconds > 0.0 or counts[name] == 0


@given(st.dictionaries(st.sampled_from(STAGES), SECONDS), st.integers(10, 100))
def test_the_bar_is_exactly_as_wide_as_asked(stages: dict[str, float], width: int) -> None:
    total_s = sum(stages.values())
    bar = drawn(draw.stage_ledger(Ledger(total_s, close(total_s, stages)), width=width), width=120).split("\n")[0]
    assert cell_len(bar) == (width if total_s > 0.0 else 0)


def test_the_ledger_names_every_stage_that_took_time_and_the_handoff() -> None:
    stages = close(1.0, {"queue": 0.05, "prefill": 0.25, "wire": 0.02, "decode": 0.6})
    text = drawn(draw.stage_ledger(Ledger(1.0, stages, 0.1, 3 << 20, "lossless", "nixl")))
    for shown in (
        "queue",
        "50.0 ms",
        "250 ms",
        "20.0 ms",
        "600 ms",
        "deliver",
        "80.0 ms",
        "3.0 MiB",
        "lossless",
        "nixl",
    ):
        assert shown in text
    assert "80% hidden" in text  # 20 of 100 ms were exposed
    assert "land" not in text


def test_a_request_without_handoff_says_so() -> None:
    assert "nothing was handed over" in drawn(draw.stage_ledger(Ledger(0.5, close(0.5, {"decode": 0.4}))))


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0, "0.00 ms"), (0.00512, "5.12 ms"), (0.0512, "51.2 ms"), (2.5, "2,500 ms")]
)
def test_milliseconds(seconds: float, shown: str) -> None:
    assert draw.milliseconds(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (256 << 20, "256.0 MiB"), (5 << 40, "5120.0 GiB")],
)
def test_size(count: int, shown: str) -> None:
    assert draw.size(count) == shown


def status(**load: int) -> pb.GetStatusResponse:
    worker = pb.Worker(
        id="p1", address="127.0.0.1:45454", state=pb.WORKER_STATE_READY, load=pb.Load(**load), load_age_s=0.2
    )
    return pb.GetStatusResponse(
        model="some-model",
        transport="tcp",
        codec="raw",
        quality_floor="exact",
        pools=[pb.Pool(role="prefill", workers=[worker]), pb.Pool(role="decode")],
        router=pb.RouterStatus(id="r1", inflight=7, tokens=12345),
    )


def test_status_fits_eighty_columns_and_shows_what_is_held() -> None:
    text = drawn(
        draw.status(
            status(
                running=3, waiting=2, waiting_tokens=1200, pages_used=9, pages_total=2048, buffer_bytes_total=256 << 20
            )
        )
    )
    for shown in (
        "some-model",
        "tcp",
        "raw",
        "127.0.0.1:45454",
        "ready",
        "1,200 tokens",
        "of 2,048",
        "of 256.0 MiB",
        "7 in flight",
    ):
        assert shown in text
    assert "not known yet" in text  # no layout
    assert "none" in text  # the empty decode pool
    assert "quarantined" not in text


def test_quarantine_shows_only_when_there_is_some() -> None:
    assert "2.0 MiB quarantined" in drawn(draw.status(status(buffer_bytes_quarantined=2 << 20)))


def test_a_worker_that_never_reported_shows_no_zeros() -> None:
    silent = pb.Worker(id="d1", address="127.0.0.1:4", state=pb.WORKER_STATE_CONNECTING)
    text = drawn(draw.status(pb.GetStatusResponse(pools=[pb.Pool(role="decode", workers=[silent])])))
    row = next(line for line in text.splitlines() if "connecting" in line)
    assert row.split()[-4:] == ["-"] * 4


def test_status_says_which_codecs_were_really_used() -> None:
    chosen = pb.GetStatusResponse(codec="auto", codecs_used="lossless 70 %, raw 30 %")
    assert "codec auto (lossless 70 %, raw 30 %)" in drawn(draw.status(chosen))
    assert "(" not in drawn(draw.status(pb.GetStatusResponse(codec="raw", codecs_used="raw"))).splitlines()[0]


def test_fetching_tells_each_step_once_without_a_terminal() -> None:
    out = io.StringIO()
    with draw.fetching(Console(file=out, width=80)) as report:
        for fraction in (0.0, 0.5, 1.0):
            report("downloading", fraction)
        report("converting", 0.0)
    assert out.getvalue().split() == ["downloading", "converting"]
