"""The data folder beside the project; tests that need it are skipped by name where it is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from placement.tables import Tables

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not here: the planner is not checked against measured tables")
    return DATA


@pytest.fixture(scope="session")
def h200(data: Path) -> Tables:
    pytest.importorskip("pyarrow", reason="pip install 'baton[bench]': H200 tables are Parquet files")
    return Tables.load(data / "h200")
