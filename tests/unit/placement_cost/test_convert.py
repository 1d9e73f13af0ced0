"""The converter on files written here, and what the kernels do where a table is missing."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from baton.errors import ConfigError
from placement.hardware import Hardware
from placement.kernels import Heads, RooflineKernels, TableKernels
from placement.model_shape import ModelShape
from placement.profile_cli import convert_tables
from placement.roofline import replica
from placement.tables import Tables

pyarrow = pytest.importorskip("pyarrow", reason="pip install 'baton[bench]': the converter reads Parquet")
FORMULAS = RooflineKernels(Hardware.load("h200-sxm"))
ONE = np.ones(1)


def _write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")


def _gemm_rows(device: str = "Toy") -> list[dict[str, Any]]:
    sizes = [2**i for i in range(4, 14)]
    return [
        {"device": device, "gemm_dtype": "bfloat16", "m": m, "n": n, "k": k,
         "latency": 1e3 * float(FORMULAS.gemm(ONE * m, n, k).seconds[0])}
        for m, n, k in product([1, *sizes], sizes, sizes)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    _write(folder, "gemm_perf", _gemm_rows())
    links = [
        {"device": "Toy", "op_name": op, "nccl_dtype": dtype, "num_gpus": ranks, "message_size": 2**i,
         "latency": (ranks if op == "all_reduce" else 99) * (0.005 + 2**i * 2 * 1e-9)}
        for op, dtype, ranks, i in product(("all_reduce", "all_gather"), ("half", "int8"), (2, 4), range(8, 28))
    ]  # fmt: skip
    _write(folder, "nccl_perf", links)
    return folder


def test_a_table_of_the_formula_answers_as_the_formula(toy: Path) -> None:
    tables = Tables.load(toy)
    assert tables.device == "Toy"
    kernels = TableKernels(tables, FORMULAS)
    m = np.array([1.0, 3.0, 100.0, 1000.0, 6000.0])
    for n, k in ((64, 64), (3000, 700), (8192, 4096)):
        estimate = kernels.gemm(m, n, k)
        assert estimate.seconds == pytest.approx(FORMULAS.gemm(m, n, k).seconds, rel=0.1)
        assert not estimate.extrapolated.any()
    assert kernels.gemm(m, 16384, 64).extrapolated.all()


def test_only_all_reduce_of_two_byte_values_is_read(toy: Path) -> None:
    kernels = TableKernels(Tables.load(toy), FORMULAS)
    seconds = kernels.all_reduce(ONE * 2**20, 4).seconds[0]
    assert seconds == pytest.approx(4 * (0.005 + 2**20 * 1e-9) / 1e3, rel=0.05)
    assert kernels.all_reduce(ONE * 2**20, 1).seconds[0] == 0
    eight = kernels.all_reduce(ONE * 2**20, 8)
    assert eight.extrapolated.all()
    assert eight.seconds[0] == FORMULAS.all_reduce(ONE * 2**20, 8).seconds[0]


def test_what_no_table_has_comes_from_the_formula_and_is_flagged(toy: Path) -> None:
    tables = Tables.load(toy)
    kernels, heads = TableKernels(tables, FORMULAS), Heads(8, 8, 128)
    for name in ("prefill_attention", "decode_attention"):
        estimate = getattr(kernels, name)(ONE, ONE * 512, heads)
        assert estimate.extrapolated.all()
        assert estimate.seconds[0] == getattr(FORMULAS, name)(ONE, ONE * 512, heads).seconds[0]
    fp8 = TableKernels(tables, RooflineKernels(FORMULAS.hardware, "fp8"))
    assert fp8.gemm(ONE, 64, 64).extrapolated.all()
    model = replica(ModelShape.load("llama-3.1-8b"), FORMULAS.hardware, tables)
    assert "prefill attention: no table" in model.extrapolations


def test_two_devices_in_one_folder_are_refused(toy: Path, tmp_path: Path) -> None:
    _write(tmp_path, "gemm_perf", [*_gemm_rows()[:50], *_gemm_rows("Other")[:50]])
    with pytest.raises(ConfigError, match="Other, Toy"):
        Tables.load(tmp_path)


def test_command_converts_and_states_the_error(toy: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(convert_tables)
    output = tmp_path / "toy.npz"
    result = CliRunner().invoke(app, [str(toy), "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert "gemm.bfloat16" in result.output
    assert "p95" in result.output
    assert Tables.load(output).grids.keys() == {"gemm.bfloat16", "all_reduce.nccl"}
