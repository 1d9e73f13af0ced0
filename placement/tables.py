"""Kernel tables of one accelerator: what they are called, how they are read from Parquet, and our own file form.

``convert`` reads files of the form that aiconfigurator writes (``gemm_perf.parquet`` and so on; times in ms, message
sizes in elements) and needs pyarrow; ``save`` and ``load`` use one compressed ``.npz`` and need numpy only.

    gemm.DTYPE                     m, n, k                            of fp8: m a multiple of 4
    gemm.DTYPE.ragged              m, n, k                            of fp8: the others
    prefill.KV_DTYPE.HEAD_DIM      batch, tokens, heads, kv_heads     causal attention of fresh prompts
    decode.KV_DTYPE.HEAD_DIM       batch, context, heads, kv_heads    one query per sequence
    all_reduce.LIBRARY             bytes, ranks
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from baton.errors import ConfigError
from placement.grids import Flags, Floats, Grid, HeldOut, Posynomial

FORM = 1
Columns = Mapping[str, npt.NDArray[Any]]

FP8_ROWS = 4  # rows that fp8 kernels want a multiple of
RAGGED = "ragged"  # other numbers of rows

_ELEMENT_BYTES = {"half": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class Tables:
    """``grids`` by the names above."""

    device: str
    grids: Mapping[str, Grid]

    @classmethod
    def load(cls, path: str | Path) -> Tables:
        """From our ``.npz``, or straight from a folder of Parquet files. Raises :class:`ConfigError`."""
        path = Path(path)
        if path.is_dir():
            return convert(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                head = json.loads(str(file["head"]))
                if head.get("form") != FORM:
                    raise ConfigError(f"{path} has form {head.get('form')}, expected {FORM}", field="tables")
                grids = {name: _unpack(file, name, entry) for name, entry in head["grids"].items()}
                return cls(str(head["device"]), grids)
        except (OSError, KeyError, ValueError) as error:
            raise ConfigError(f"cannot read kernel tables from {path}: {error}", field="tables") from None

    def save(self, path: str | Path) -> None:
        arrays: dict[str, npt.NDArray[Any]] = {}
        head: dict[str, Any] = {"form": FORM, "device": self.device, "grids": {}}
        for name, grid in self.grids.items():
            head["grids"][name] = {"axes": grid.axes, "reach": grid.reach, "scale": grid.scale}
            # Half a thousandth of a logarithm is far below the noise of the measurements.
            arrays[f"{name}/log_s"] = grid.log_s.astype(np.float16)
            arrays[f"{name}/roofline"] = grid.roofline.terms
            for axis, nodes in enumerate(grid.nodes):
                arrays[f"{name}/nodes{axis}"] = nodes
        with Path(path).open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, head=np.array(json.dumps(head)), **arrays)

    def held_out(self) -> Iterator[tuple[str, HeldOut]]:
        """5-fold held-out error of every table, one by one: the whole takes about a minute."""
        for name, grid in sorted(self.grids.items()):
            yield name, grid.held_out()


def _unpack(file: Mapping[str, npt.NDArray[Any]], name: str, entry: Mapping[str, Any]) -> Grid:
    axes = tuple(entry["axes"])
    return Grid(
        axes=axes,
        nodes=tuple(file[f"{name}/nodes{axis}"] for axis in range(len(axes))),
        log_s=file[f"{name}/log_s"].astype(np.float64),
        roofline=Posynomial(file[f"{name}/roofline"]),
        reach=tuple(entry["reach"]),
        scale=tuple(entry["scale"]),
    )


def convert(folder: str | Path) -> Tables:
    """Every table that ``folder`` has. Raises :class:`ConfigError` when there is none or pyarrow is missing."""
    folder = Path(folder)
    grids: dict[str, Grid] = {}
    devices: set[str] = set()
    for file, build in _BUILDERS.items():
        path = folder / f"{file}.parquet"
        if path.is_file():
            columns = _read(path)
            devices |= set(columns["device"].tolist())
            grids |= build(columns)
    if not grids:
        raise ConfigError(f"{folder} has none of {', '.join(f'{name}.parquet' for name in _BUILDERS)}", field="tables")
    if len(devices) != 1:
        raise ConfigError(f"{folder} mixes devices: {', '.join(sorted(devices))}", field="tables")
    return Tables(devices.pop(), grids)


def _read(path: Path) -> Columns:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ConfigError("reading Parquet needs pyarrow: pip install 'baton[bench]'", field="tables") from None
    table = parquet.read_table(path)
    return {name: np.asarray(table.column(name).to_pylist()) for name in table.column_names}


def _gemm(columns: Columns) -> dict[str, Grid]:
    """One table per dtype; of fp8 two. Its kernels take other ways for numbers of rows that are no multiple of
    ``FP8_ROWS``: 257 rows may take 2.5 times as long as 256, and 512 less again. Between neighbours in m of one kind
    times still jump, at the borders of tiles, but hardly between neighbours in n and k: those count for more there."""
    axes, grids = {a: columns[a] for a in ("m", "n", "k")}, {}
    for dtype in sorted(set(columns["gemm_dtype"].tolist())):
        chosen, even = columns["gemm_dtype"] == dtype, columns["m"] % FP8_ROWS == 0
        if not dtype.startswith("fp8"):
            grids[f"gemm.{dtype}"] = _grid(columns, chosen, axes, (4, 2, 2), (0.2, 0.2, 0.2))
            continue
        for name, kind in ((f"gemm.{dtype}", even), (f"gemm.{dtype}.{RAGGED}", ~even)):
            grids[name] = _grid(columns, chosen & kind, axes, (1, 3, 3), (0.03, 0.3, 0.3))
    return grids


def _attention(columns: Columns, name: str, length: str, lengths: npt.NDArray[Any]) -> dict[str, Grid]:
    """Tables per KV dtype and head size, full attention only."""
    axes = {
        "batch": columns["batch_size"],
        length: lengths,
        "heads": columns["num_heads"],
        "kv_heads": columns["num_key_value_heads"],
    }
    full = columns["window_size"] == 0
    grids = {}
    for dtype in sorted(set(columns["kv_cache_dtype"].tolist())):
        for size in sorted(set(columns["head_dim"].tolist())):
            chosen = full & (columns["kv_cache_dtype"] == dtype) & (columns["head_dim"] == size)
            grids[f"{name}.{dtype}.{size}"] = _grid(columns, chosen, axes, (2, 2, 2, 1), (0.15, 0.15, 0.2, 0.2))
    return grids


def _prefill(columns: Columns) -> dict[str, Grid]:
    return _attention(columns, "prefill", "tokens", columns["isl"])


def _decode(columns: Columns) -> dict[str, Grid]:
    # ``step`` counts the tokens before the one that is computed.
    return _attention(columns, "decode", "context", columns["step"] + columns["isl"])


def _nccl(columns: Columns) -> dict[str, Grid]:
    chosen = (columns["op_name"] == "all_reduce") & (columns["nccl_dtype"] == "half")
    return _all_reduce(columns, "nccl", chosen, _ELEMENT_BYTES["half"])


def _custom(columns: Columns) -> dict[str, Grid]:
    names = sorted(set(columns["backend"].tolist()))
    return {
        key: grid
        for name in names
        for key, grid in _all_reduce(columns, name, columns["backend"] == name, _ELEMENT_BYTES["bfloat16"]).items()
    }


def _all_reduce(columns: Columns, library: str, chosen: Flags, element_bytes: int) -> dict[str, Grid]:
    axes = {"bytes": columns["message_size"] * element_bytes, "ranks": columns["num_gpus"]}
    return {f"all_reduce.{library}": _grid(columns, chosen, axes, (2, 0), (0.3, 0.3))}


def _grid(
    columns: Columns,
    chosen: Flags,
    axes: Mapping[str, npt.NDArray[Any]],
    reach: tuple[int, ...],
    scale: tuple[float, ...],
) -> Grid:
    points = np.stack([values[chosen] for values in axes.values()], axis=1).astype(np.float64)
    seconds: Floats = columns["latency"][chosen].astype(np.float64) / 1e3
    return Grid.of_rows(tuple(axes), points, seconds, reach, scale)


_BUILDERS = {
    "gemm_perf": _gemm,
    "context_attention_perf": _prefill,
    "generation_attention_perf": _decode,
    "nccl_perf": _nccl,
    "custom_allreduce_perf": _custom,
}
