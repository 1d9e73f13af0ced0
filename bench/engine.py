"""The engine alone, on this machine: `python -m bench.engine cpu|prefix|chunked|gpu`. Servers are bench.peers' matter.

Every figure is the median of several, beside a limit or a baseline measured in the same run.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any
from unittest import mock

import torch
import typer

from baton.config import Config, PoolConfig
from baton.request import Sampling, Work
from bench import report
from engine import hub, weights
from engine.build import build_engine, choose_ops, load_model
from engine.engine import Engine
from engine.model import Model
from engine.ops import TorchOps
from engine.spec import ModelSpec
from engine.text import Detokenizer, Tokenizer

CONTEXT = 512
LONG, CACHED = 1900, 1800
REPEATS = 5
BUDGET_S = 3600.0
LLAMA_8B = ModelSpec(
    vocab_size=128_256, hidden=4096, intermediate=14_336, layers=32, heads=32, kv_heads=8, head_dim=128,
    norm_eps=1e-5, rope_theta=500_000.0, rope_scaling=None, tied_head=False, max_context=8192,
    bos_token_id=None, eos_token_ids=(),
)  # fmt: skip

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
Threads = Annotated[int, typer.Option(help="Torch threads; a worker of a two-core machine has one.")]


def pool(**changes: Any) -> PoolConfig:
    return PoolConfig(**{"kv_tokens": 32_768, **changes})


def work(name: str, tokens: Sequence[int], outputs: int) -> Work:
    return Work(name, tuple(tokens), Sampling(temperature=0.0, max_tokens=outputs), 0, BUDGET_S)


def prompt(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(100, 40_000), k=count)


def seconds(act: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    act()
    return time.perf_counter() - start_s


def median_s(act: Callable[[], object], repeats: int = REPEATS) -> float:
    act()
    return statistics.median(seconds(act) for _ in range(repeats))


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that this device's threads read from memory: the limit of a decode step."""
    block = torch.ones(1 << 26, device=device)  # 256 MiB: far larger than any cache

    def read() -> None:
        block.sum().item()

    return block.numel() * 4 / median_s(read, 3 * REPEATS)


def model_bytes(spec: ModelSpec, size: int) -> int:
    """Bytes of the matrices that one decode step reads."""
    width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    layer = spec.hidden * (2 * width + 2 * kv_width + 3 * spec.intermediate)
    return size * (spec.layers * layer + spec.vocab_size * spec.hidden)


def running(engine: Engine, batch: int, context: int, outputs: int) -> None:
    """``batch`` sequences of ``context`` tokens that all decode."""
    for index in range(batch):
        engine.add(work(f"run-{index}", prompt(context, index), outputs))
    while engine.load().running < batch or engine.load().waiting_tokens:
        engine.step()


def decode_steps(model: Model, batch: int, steps: int = 30) -> dict[str, float]:
    """A decode step of ``batch`` sequences, and how much of it is the model's forward pass."""
    engine = build_engine(model, pool(prefix_cache=False), 4096)
    running(engine, batch, CONTEXT, 10 * steps)
    forward, spent = model.forward, []

    def timed(*arguments: Any) -> torch.Tensor:
        start_s = time.perf_counter()
        logits = forward(*arguments)
        spent.append(time.perf_counter() - start_s)
        return logits

    with mock.patch.object(model, "forward", timed):
        engine.step()
        spent.clear()
        whole = [seconds(engine.step) for _ in range(steps)]
    share = 1.0 - statistics.median(inside / all_ for inside, all_ in zip(spent, whole, strict=True))
    return {"step_ms": 1e3 * statistics.median(whole), "not_model_share": share}


def detokenize_ms(folder: Path, tokens: int = 200) -> float:
    """Milliseconds that the router spends to turn one token into text."""
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode(" ".join(topics["assert"].split()))[:tokens]
    detokenizer = Detokenizer(tokenizer)

    def push() -> None:
        for token in ids:
            detokenizer.push(token)

    return 1e3 * median_s(push) / len(ids)


def prefill_tokens_s(model: Model) -> float:
    engine = build_engine(model, pool(prefix_cache=False), 4096)
    return CONTEXT / statistics.median(first_token_s(engine, prompt(CONTEXT, seed)) for seed in range(REPEATS + 1))


def first_token_s(engine: Engine, tokens: Sequence[int]) -> float:
    """Seconds until the first token of a lone request."""

    def run() -> None:
        engine.add(work("first", tokens, 1))
        while engine.has_work:
            engine.step()

    return seconds(run)


def small_model(threads: int) -> tuple[Model, Path]:
    config = Config().model
    folder = hub.resolve(config.id, Path(config.cache_dir).expanduser())
    return load_model(folder, config.dtype, threads), folder


def transformers_s(folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """The baseline everyone has: prefill tokens a second, and a decode step at batch 1."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = torch.tensor([prompt(CONTEXT, 0)])
    with torch.inference_mode():
        prefill_s = median_s(lambda: theirs(ids, use_cache=True, logits_to_keep=1))
        cache = theirs(ids, use_cache=True).past_key_values
        step_s = median_s(lambda: theirs(ids[:, :1], past_key_values=cache), 20)
    return {"prefill_tokens_s": CONTEXT / prefill_s, "step_ms": 1e3 * step_s}


@app.command()
def cpu(threads: Threads = 1) -> None:
    """Decode steps against the bandwidth floor, prefill, and both against transformers.

    ``not_model_share`` is the part of a step outside the forward pass, with the text of its tokens.
    """
    model, folder = small_model(threads)
    bandwidth = read_bandwidth(model.device)
    floor_s = model_bytes(model.spec, 2) / bandwidth
    rows = {batch: decode_steps(model, batch) for batch in (1, 4, 8)}
    token_ms = detokenize_ms(folder)
    for batch, row in rows.items():
        row["of_floor"] = 1e3 * floor_s / row["step_ms"]
        row["not_model_share"] += batch * token_ms / row["step_ms"]
    result = {
        "threads": threads,
        "compute": str(model.dtype),
        "operations": type(model.ops).__name__,
        "read_gb_s": bandwidth / 1e9,
        "floor_ms": 1e3 * floor_s,
        "detokenize_ms": token_ms,
        "decode": rows,
        "prefill_tokens_s": prefill_tokens_s(model),
        "transformers": transformers_s(folder, model.dtype),
    }
    _print(result)
    report.save(f"engine-cpu-{threads}", result)


@app.command()
def prefix(threads: Threads = 1) -> None:
    """Hit rates of an unbounded cache on the Mooncake traces, and what a hit does to the first token."""
    from bench.prefix import hit_rates

    model, _ = small_model(threads)
    engine = build_engine(model, pool(), 4096)
    cold, warm = [], []
    for seed in range(REPEATS):
        tokens = prompt(LONG, 100 + seed)
        cold.append(first_token_s(engine, prompt(LONG, seed)))
        first_token_s(engine, tokens[:CACHED])
        warm.append(first_token_s(engine, tokens))
    uncached_s, cached_s = statistics.median(cold), statistics.median(warm)
    result = {
        "hit_rates": hit_rates(),
        "uncached_ms": 1e3 * uncached_s,
        "cached_ms": 1e3 * cached_s,
        "ratio": cached_s / uncached_s,
    }
    _print(result)
    report.save("engine-prefix", result)


@app.command()
def chunked(threads: Threads = 1, passes: int = 3) -> None:
    """Token gaps of eight decodes while a long prompt arrives: none, chunked as configured, unchunked."""
    model, _ = small_model(threads)
    settings = {
        "no prompt": (pool(prefix_cache=False), 0),
        "chunked": (pool(prefix_cache=False), LONG),
        "unchunked": (pool(prefix_cache=False, step_tokens=2048, mixed_tokens=2048), LONG),
    }
    rows: dict[str, dict[str, float]] = {}
    for name, (config, length) in settings.items():
        runs = [_gaps(model, config, length) for _ in range(passes)]
        rows[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    for row in rows.values():
        row["over_no_prompt"] = row["p99_ms"] / rows["no prompt"]["p99_ms"]
    _print(rows)
    report.save("engine-chunked", rows)


def _gaps(model: Model, config: PoolConfig, length: int) -> dict[str, float]:
    """Milliseconds between the tokens of eight decodes until ``length`` tokens are prefilled, at least 100 steps.

    A prompt before it shows the engine what mixed steps cost here, as the first minute of service does.
    """
    engine = build_engine(model, config, 4096)
    running(engine, 8, CONTEXT, 2000)
    engine.add(work("earlier", prompt(length or 1, 76), 1))
    while engine.load().running > 8 or engine.load().waiting_tokens:
        engine.step()
    start_s, first_s = time.perf_counter(), 0.0
    if length:
        engine.add(work("long", prompt(length, 77), 1))
    gaps: list[float] = []
    while len(gaps) < 100 or (length and not first_s):
        step_s = time.perf_counter()
        events = engine.step()
        gaps.append(time.perf_counter() - step_s)
        if any(event.request_id == "long" for event in events):
            first_s = time.perf_counter() - start_s
    ordered = sorted(gaps)
    return {
        "p50_ms": 1e3 * ordered[len(ordered) // 2],
        "p99_ms": 1e3 * ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))],
        "long_ttft_ms": 1e3 * first_s,
    }


@app.command()
def gpu(batch: int = 64, context: int = 1024) -> None:
    """A decode step of an 8B-shaped model with random weights against the bandwidth floor. Needs CUDA."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return
    from bench.kernels import copy_bandwidth

    device = torch.device("cuda")
    ops = choose_ops(torch.bfloat16, device, LLAMA_8B.head_dim)
    model = Model(LLAMA_8B, name="random-8b", dtype="bfloat16", device=device, ops=ops)
    for place in weights.places(model).values():
        assert place.target is not None, "one rank has every tensor"
        place.target.normal_(0.0, 0.02)
    model.pack()
    bandwidth = copy_bandwidth(device)
    engine = build_engine(model, pool(kv_tokens=2 * batch * context, max_running=batch), 4096)
    running(engine, batch, context, 200)

    def step() -> None:
        engine.step()
        torch.cuda.synchronize(device)

    step_s = median_s(step, 20)
    kv_bytes = 2 * 2 * LLAMA_8B.layers * LLAMA_8B.kv_heads * LLAMA_8B.head_dim * batch * context
    floor_s = (model_bytes(LLAMA_8B, 2) + kv_bytes) / bandwidth
    result = {
        "batch": batch,
        "context": context,
        "step_ms": 1e3 * step_s,
        "floor_ms": 1e3 * floor_s,
        "ratio": step_s / floor_s,
    }
    _print(result)
    report.save("engine-gpu", result)


@app.command("before-after")
def before_after(threads: Threads = 1) -> None:
    """What the operations of this device gain over plain torch, in one run."""
    model, folder = small_model(threads)
    plain = Model(model.spec, name="plain", dtype="float32", device=model.device, storage=model.storage)
    weights.load(plain, folder)
    plain.pack()
    assert isinstance(plain.ops, TorchOps)
    result = {}
    for name, each in (("torch", plain), (type(model.ops).__name__, model)):
        steps = {batch: decode_steps(each, batch)["step_ms"] for batch in (1, 4, 8)}
        result[name] = {"step_ms": steps, "prefill_tokens_s": prefill_tokens_s(each)}
    _print(result)
    report.save("engine-before-after", result)


def _print(tree: Any, indent: str = "") -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            _print(value, indent + "  ")
        else:
            print(f"{indent}{key}: {value:.4g}" if isinstance(value, float) else f"{indent}{key}: {value}")


if __name__ == "__main__":
    app()
