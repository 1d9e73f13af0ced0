"""The converter and the H200 tables: known rows, the file form, and the error of rows held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from baton.errors import ConfigError
from placement.grids import Grid, HeldOut
from placement.hardware import Hardware
from placement.kernels import Heads, RooflineKernels, TableKernels
from placement.tables import Tables

MEDIAN, P95 = 0.05, 0.15


def _columns(folder: Path, name: str) -> dict[str, list[object]]:
    from pyarrow import parquet

    columns: dict[str, list[object]] = parquet.read_table(folder / "h200" / f"{name}.parquet").to_pydict()
    return columns


@pytest.mark.parametrize(
    "name",
    ["prefill.bfloat16.128", "decode.bfloat16.128", "all_reduce.nccl", "all_reduce.vllm_graph"],
)
def test_held_out_error(h200: Tables, name: str) -> None:
    error = h200.grids[name].held_out()
    assert error.median <= MEDIAN
    assert error.p95 <= P95


@pytest.mark.slow
def test_held_out_error_of_gemm(h200: Tables) -> None:
    error = h200.grids["gemm.bfloat16"].held_out()
    assert error.rows == 35742
    assert error.median <= MEDIAN
    assert error.p95 <= P95


@pytest.mark.parametrize("name", ["gemm.fp8", "gemm.fp8.ragged", "gemm.fp8_block", "gemm.fp8_block.ragged"])
def test_held_out_error_of_fp8_gemm_by_whether_four_divides_its_rows(h200: Tables, name: str) -> None:
    error = h200.grids[name].held_out()
    assert error.rows > 10_000
    assert error.median <= MEDIAN
    assert error.p95 <= P95


def test_fp8_rows_that_four_does_not_divide_are_slower(h200: Tables) -> None:
    kernels = TableKernels(h200, RooflineKernels(Hardware.load("h200-sxm"), "fp8"))
    even, odd = kernels.gemm(np.array([256.0, 257.0]), 8192, 8192).seconds
    assert odd > 1.5 * even


def test_known_gemm_rows(h200: Tables, data: Path) -> None:
    columns = _columns(data, "gemm_perf")
    rows = [i for i, dtype in enumerate(columns["gemm_dtype"]) if dtype == "bfloat16"][::37]
    points = np.array([[columns[axis][i] for axis in ("m", "n", "k")] for i in rows], dtype=np.float64)
    measured = np.array([columns["latency"][i] for i in rows], dtype=np.float64) / 1e3
    estimate = h200.grids["gemm.bfloat16"].estimate(points)
    error = HeldOut.of(estimate.seconds, measured)
    assert (error.median, error.p95) < (0.03, 0.12)
    # One corner, n = k = 65536, was not measured; no row borders on nothing.
    assert not estimate.extrapolated.any()


def test_message_sizes_are_elements(h200: Tables) -> None:
    """An all-reduce of 1 GiB over 8 GPUs cannot beat 450 GB/s links: it moves 2 * 7/8 of the bytes per link."""
    estimate = h200.grids["all_reduce.vllm_graph"].estimate(np.array([[2.0**30, 8.0]]))
    assert estimate.seconds[0] == pytest.approx(3.9985e-3, rel=0.1)
    assert 1.75 * 2**30 / estimate.seconds[0] < 480e9


def test_decode_context_counts_the_new_token(h200: Tables) -> None:
    assert h200.grids["decode.bfloat16.128"].nodes[1].tolist()[:4] == [2, 4, 8, 16]
    seconds = h200.grids["decode.bfloat16.128"].estimate(np.array([[16.0, 8192.0, 64.0, 8.0]])).seconds[0]
    assert seconds == pytest.approx(0.133021e-3, rel=0.05)


def test_grouped_query_prefill_rows_beat_the_hardware_and_are_not_used(h200: Tables) -> None:
    hardware = Hardware.load("h200-sxm")
    kernels = TableKernels(h200, RooflineKernels(hardware))
    flops = 2.0 * 64 * 128 * 16384 * 16385
    row = h200.grids["prefill.bfloat16.128"].estimate(np.array([[1.0, 16384.0, 64.0, 8.0]])).seconds[0]
    assert flops / row > 5 * hardware.peak_flops("bfloat16")
    one, length = np.ones(1), np.array([16384.0])
    used = kernels.prefill_attention(one, length, Heads(64, 8, 128)).seconds[0]
    assert used == pytest.approx(20.15e-3, rel=0.05)


def test_no_kernel_beats_the_peak(h200: Tables) -> None:
    formulas = RooflineKernels(Hardware.load("h200-sxm"))
    m = np.geomspace(1, 1e6, 60)
    for n, k in ((8192, 8192), (57344, 8192), (128256, 8192), (64, 64)):
        seconds = TableKernels(h200, formulas).gemm(m, n, k).seconds
        assert (2 * m * n * k / seconds <= formulas.peak * (1 + 1e-9)).all()


def test_more_kv_heads_than_measured_are_flagged(h200: Tables) -> None:
    kernels = TableKernels(h200, RooflineKernels(Hardware.load("h200-sxm")))
    batch, context = np.array([4.0]), np.array([2048.0])
    wide = kernels.decode_attention(batch, context, Heads(40, 40, 128))
    assert wide.extrapolated.all()
    assert wide.seconds[0] == pytest.approx(
        kernels.decode_attention(5 * batch, context, Heads(8, 8, 128)).seconds[0], rel=1e-6
    )
    assert not kernels.decode_attention(batch, context, Heads(8, 8, 128)).extrapolated.any()


def test_saved_tables_answer_alike(h200: Tables, tmp_path: Path) -> None:
    file = tmp_path / "h200.npz"
    kept = {name: h200.grids[name] for name in ("all_reduce.nccl", "decode.bfloat16.128")}
    Tables(h200.device, kept).save(file)
    loaded = Tables.load(file)
    assert loaded.device == "NVIDIA H200"
    points = np.array([[3.0, 700.0, 8.0, 1.0], [4000.0, 1e6, 8.0, 1.0]])
    before, after = (t.grids["decode.bfloat16.128"].estimate(points) for t in (h200, loaded))
    assert after.seconds == pytest.approx(before.seconds, rel=0.005)
    assert (after.extrapolated == before.extrapolated).all()


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    with pytest.raises(ConfigError, match="cannot read kernel tables"):
        Tables.load(tmp_path / "bad.npz")
    with pytest.raises(ConfigError, match=r"gemm_perf\.parquet"):
        Tables.load(tmp_path)
    other = tmp_path / "old.npz"
    with other.open("wb") as file:
        np.savez(file, head=np.array('{"form": 0}'))
    with pytest.raises(ConfigError, match="form 0"):
        Tables.load(other)


def test_a_table_of_rows_needs_no_full_grid() -> None:
    points = np.array([[1.0, 2.0], [1.0, 4.0], [8.0, 2.0], [16.0, 32.0], [2.0, 2.0], [4.0, 4.0]])
    grid = Grid.of_rows(("bytes", "ranks"), points, points[:, 0] * 1e-6, (2, 0), (0.3, 0.3))
    assert np.isfinite(grid.estimate(np.array([[3.0, 3.0], [16.0, 2.0]])).seconds).all()
