"""One prompt's real KV, and the pace at which a real engine computed its layers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch

from baton.config import Config, PoolConfig
from baton.layout import Dtype, KVLayout
from baton.request import Sampling, Work
from bench.ends import Push
from engine import hub
from engine.build import build_engine, load_model
from engine.cache import TORCH_DTYPES
from engine.engine import Chunk
from engine.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    layout: KVLayout
    tokens: int
    path: Path  # KV by layer, as ``bench.ends.stored`` reads it
    pushes: tuple[Push, ...]  # as prefill computed them, on one core
    prefill_s: float

    def at_once(self) -> tuple[Push, ...]:
        """The same pushes, all due at the beginning: what an endlessly fast engine would do."""
        return tuple(Push(0.0, push.layer, push.start, push.count) for push in self.pushes)


class _Pace:
    """Observes the engine: when each layer of each chunk was computed."""

    def __init__(self) -> None:
        self.written: list[tuple[float, int, Chunk]] = []

    def layer_written(self, layer: int, chunks: Sequence[Chunk]) -> None:
        self.written += [(time.monotonic(), layer, chunk) for chunk in chunks]


def text(folder: Path, tokens: int) -> tuple[int, ...]:
    """The beginning of CPython's own documentation topics, which is English that every machine has."""
    found = Tokenizer(folder).encode("\n".join(str(topics.topics[name]) for name in sorted(topics.topics)))
    return tuple(found[:tokens])


def record(tokens: int, dtype: Dtype, folder: Path) -> Prompt:
    """Prefills ``tokens`` of text in float32 and keeps its KV, rounded to ``dtype``, in ``folder``."""
    config, pace = Config().model, _Pace()
    model_folder = hub.resolve(config.id, Path(config.cache_dir).expanduser())
    engine = build_engine(
        load_model(model_folder, "float32", 1),
        PoolConfig(kv_tokens=2048, threads=1, prefix_cache=False),
        2048,
        observer=pace,
    )
    ids = text(model_folder, tokens)
    prefill_s = 0.0
    for name in ("warm-up", "prompt"):  # the first one pays for paging in
        pace.written.clear()
        engine.add(Work(name, ids, Sampling(temperature=0.0, max_tokens=1), 0, 600.0), prefill_only=True)
        begun_s = time.monotonic()
        while not engine.step():
            pass
        prefill_s = time.monotonic() - begun_s
        table = pace.written[-1][2].pages
        pairs = [engine.cache.gather(layer, table, 0, tokens) for layer in range(engine.layout.layers)]
        engine.release(name)
    path = folder / f"prompt-{tokens}-{dtype}.pt"
    torch.save([torch.cat(pair, dim=1).to(TORCH_DTYPES[dtype]) for pair in pairs], path)
    engine.close()
    shape = engine.layout
    layout = KVLayout(shape.model, shape.layers, shape.kv_heads, shape.head_dim, dtype)
    pushes = tuple(Push(at_s - begun_s, layer, chunk.start, chunk.count) for at_s, layer, chunk in pace.written)
    return Prompt(layout, tokens, path, pushes, prefill_s)
