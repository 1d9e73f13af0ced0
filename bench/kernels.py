"""The Triton kernels against what the GPU can do at all: ``python -m bench.kernels``.

Kernels that memory limits are set against a device copy, those that arithmetic limits against torch's bf16 matrix
product, both measured in the same run, and each beside what plain torch needs. Times are medians of 5 of a CUDA graph
of several launches, so that neither the host nor a first launch is in them. Without a GPU only what the ahead-of-time
compiler reports is told: registers, shared memory and spills of every kernel.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from baton.request import Sampling
from bench import report
from engine.kernels import activation, aot, norm, reference, rope, sampling
from engine.kernels.codec import Arrays, Grid, PagedKernels
from engine.kernels.paged_decode import choose_splits, paged_decode, workspace_elements
from engine.kernels.paged_prefill import paged_prefill
from kvtransfer.codecs.quantised import LADDER

REPEATS = 5
GRAPH_S = 0.02  # each timed graph runs at least about this long
HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS = 32, 8, 128, 16
HIDDEN, INTERMEDIATE, VOCAB, ROWS = 4096, 14_336, 128_256, 8192
KV_LIMIT = 32 << 30  # bytes of keys and values; longer contexts than that at the largest batches are left out
DTYPE = torch.bfloat16
TARGETS = {"decode": 0.85, "prefill": 0.60, "codec int4": 0.60}


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel at one size. ``reached`` is its share of the limit, ``plain_s`` what torch needs for the same."""

    name: str
    seconds: float
    amount: float  # bytes moved, or floating-point operations
    reached: float
    plain_s: float | None


def timed(act: Callable[[], object]) -> float:
    """Seconds of one ``act`` on the GPU, which must be able to be captured."""
    act()
    torch.cuda.synchronize()
    once = _graph(act, 1)
    launches = max(3, min(200, int(GRAPH_S / max(_replay_s(once), 1e-6))))
    graph = _graph(act, launches)
    _replay_s(graph)
    return statistics.median(_replay_s(graph) for _ in range(REPEATS)) / launches


def _graph(act: Callable[[], object], launches: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            act()
    return graph


def _replay_s(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written together, of a copy that no cache holds."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source))


def matmul_rate(device: torch.device) -> float:
    """Floating-point operations a second of torch's bf16 matrix product at its best size of a few."""
    rates = []
    for size in (4096, 8192):
        left, right = (torch.randn(size, size, device=device, dtype=DTYPE) for _ in range(2))
        rates.append(2 * size**3 / timed(partial(torch.mm, left, right)))
    return max(rates)


def normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=DTYPE)


def decode_rows(device: torch.device, bandwidth: float) -> Iterator[Row]:
    for batch in (32, 64, 128, 256):
        for context in (1024, 4096, 8192, 32_768):
            if 4 * KV_HEADS * HEAD_DIM * batch * context <= KV_LIMIT:
                yield decode_row(device, bandwidth, batch, context)


def decode_row(device: torch.device, bandwidth: float, batch: int, context: int) -> Row:
    layer = normal(batch * context, 2 * KV_HEADS, HEAD_DIM, device=device)
    table = torch.randperm(batch * context // PAGE_TOKENS, device=device).int().view(batch, -1)
    contexts = torch.full((batch,), context, dtype=torch.int32, device=device)
    queries = normal(batch, HEADS, HEAD_DIM, device=device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    splits = choose_splits(batch, KV_HEADS, context, processors)
    workspace = torch.empty(workspace_elements(batch, HEADS, HEAD_DIM, splits), device=device)
    seconds = timed(
        lambda: paged_decode(
            queries, layer, table, contexts,
            page_tokens=PAGE_TOKENS, scale=HEAD_DIM**-0.5, splits=splits, workspace=workspace,
        )
    )  # fmt: skip
    # Torch is given the keys and values in order: it has no pages to look up.
    keys, values = (half.transpose(1, 2) for half in layer.view(batch, context, -1, HEAD_DIM).chunk(2, dim=2))
    grouped = queries.view(batch, KV_HEADS, -1, HEAD_DIM)
    plain_s = timed(lambda: scaled_dot_product_attention(grouped, keys, values))
    moved = 2 * layer.numel() + 2 * 2 * queries.numel() + 4 * table.numel()
    name = f"decode attention, batch {batch}, context {context}, {splits} splits"
    return Row(name, seconds, moved, moved / seconds / bandwidth, plain_s)


def prefill_rows(device: torch.device, rate: float) -> Iterator[Row]:
    for count, start in ((8192, 0), (2048, 6144), (512, 7680)):
        context = start + count
        layer = normal(context, 2 * KV_HEADS, HEAD_DIM, device=device)
        table = torch.randperm(context // PAGE_TOKENS, device=device).int()[None]
        queries = normal(count, HEADS, HEAD_DIM, device=device)
        chunk = (torch.tensor([each], dtype=torch.int32, device=device) for each in (0, start, count))
        out = torch.empty_like(queries)
        run = partial(paged_prefill, longest=count, page_tokens=PAGE_TOKENS, scale=HEAD_DIM**-0.5, out=out)
        seconds = timed(partial(run, queries, layer, table, *chunk))
        seen = count * start + count * (count + 1) // 2  # pairs of a query and a key
        operations = 4.0 * HEADS * HEAD_DIM * seen
        plain_s = _sdpa_s(queries, layer) if start == 0 else None  # with a prefix its fast path cannot be causal
        name = f"prefill attention, {count} rows behind {start}"
        yield Row(name, seconds, operations, operations / seconds / rate, plain_s)


def _sdpa_s(queries: Tensor, layer: Tensor) -> float:
    """Torch's causal attention over keys and values that are in order and repeated beforehand."""
    sharing = HEADS // KV_HEADS
    keys, values = (half.transpose(0, 1).repeat_interleave(sharing, 0)[None] for half in layer.chunk(2, dim=1))
    rows = queries.transpose(0, 1)[None]
    return timed(lambda: scaled_dot_product_attention(rows, keys, values, is_causal=True))


def elementwise_rows(device: torch.device, bandwidth: float) -> Iterator[Row]:
    """``ROWS`` rows of an 8B model, enough to leave every cache."""
    hidden, delta = normal(ROWS, HIDDEN, device=device), normal(ROWS, HIDDEN, device=device)
    weight, gate_up = normal(HIDDEN, device=device), normal(ROWS, 2 * INTERMEDIATE, device=device)
    qkv = normal(ROWS, HEADS + 2 * KV_HEADS, HEAD_DIM, device=device)
    cos, sin = normal(ROWS, HEAD_DIM, device=device), normal(ROWS, HEAD_DIM, device=device)
    slots = torch.randperm(ROWS, device=device)
    layer = normal(ROWS, 2 * KV_HEADS, HEAD_DIM, device=device)
    one = 2 * hidden.numel()  # bytes
    kept = 2 * (qkv.numel() + ROWS * (HEADS + KV_HEADS) * HEAD_DIM + layer.numel() + 2 * cos.numel())
    pairs: list[tuple[str, int, Callable[[], object], Callable[[], object]]] = [
        ("norm", 2 * one, lambda: norm.norm(hidden, weight, 1e-5), lambda: reference.norm(hidden, weight, 1e-5)),
        (
            "add and norm", 4 * one,
            lambda: norm.add_norm(hidden, delta, weight, 1e-5), lambda: reference.add_norm(hidden, delta, weight, 1e-5),
        ),
        (
            "silu and mul", 3 * gate_up.numel(),
            lambda: activation.silu_mul(gate_up), lambda: reference.silu_mul(gate_up),
        ),
        (
            "rotate and write", kept,
            lambda: rope.rope_write(qkv, cos, sin, slots, layer), lambda: _twin_rope(qkv, cos, sin, slots, layer),
        ),
    ]  # fmt: skip
    for name, moved, kernel, plain in pairs:
        seconds = timed(kernel)
        yield Row(f"{name}, {ROWS} rows", seconds, moved, moved / seconds / bandwidth, timed(plain))


def _twin_rope(qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, layer: Tensor) -> None:
    """What the engine does without kernels (engine.ops.TorchOps)."""
    rotated = qkv[:, :-KV_HEADS]
    swapped = rotated.roll(HEAD_DIM // 2, dims=-1)
    rotated.mul_(cos[:, None]).addcmul_(swapped, sin[:, None])
    layer.index_copy_(0, slots, qkv[:, -2 * KV_HEADS :])


def sampling_rows(device: torch.device, bandwidth: float) -> Iterator[Row]:
    """Against one read of the logits, which is what greedy needs; torch sorts them all."""
    logits = 4.0 * torch.randn(64, VOCAB, device=device)
    kinds = {
        "greedy": Sampling(temperature=0.0, max_tokens=8),
        "top-k 50, top-p 0.9": Sampling(temperature=0.8, top_k=50, top_p=0.9, max_tokens=8),
        "min-p 0.05": Sampling(temperature=0.8, min_p=0.05, max_tokens=8),
    }
    for name, kind in kinds.items():
        columns = [kind.temperature, kind.top_k, kind.top_p, kind.min_p, 0.5]
        controls = torch.tensor(columns, dtype=torch.float64, device=device)[:, None].repeat(1, 64)
        seconds = timed(partial(sampling.choose, logits, controls))
        plain_s = timed(partial(torch.argmax, logits, -1) if kind.temperature == 0.0 else partial(torch.sort, logits))
        moved = 4 * logits.numel()
        yield Row(f"sampling of 64 rows, {name}", seconds, moved, moved / seconds / bandwidth, plain_s)


def codec_rows(device: torch.device, bandwidth: float) -> Iterator[Row]:
    """A layer's pages to blocks in device memory and back; values once, levels and scales once."""
    tokens, kernels = 32_768, PagedKernels()
    layer, slots = normal(2 * tokens, 2 * KV_HEADS, HEAD_DIM, device=device), torch.randperm(2 * tokens, device=device)
    slots = slots[:tokens].contiguous()
    for name, level in LADDER.items():
        halves: list[tuple[Tensor, Tensor, Grid, Arrays]] = []
        for rows, grid in zip(layer.chunk(2, dim=1), (level.keys, level.values), strict=True):
            size = tokens, KV_HEADS, HEAD_DIM
            scales = torch.empty(grid.groups(*size), dtype=torch.int16, device=device)
            middles = torch.empty(grid.middles(*size), dtype=torch.int16, device=device)
            levels = torch.empty(grid.level_bytes(*size), dtype=torch.uint8, device=device)
            halves.append((rows, slots, grid, (scales, middles, levels)))
        moved = 2 * 2 * KV_HEADS * HEAD_DIM * tokens + sum(part.nbytes for half in halves for part in half[3])
        for verb, act in (("encode", kernels.quantise), ("decode", kernels.dequantise)):
            seconds = timed(partial(_each, act, halves))
            yield Row(f"codec {name} {verb}, {tokens} tokens", seconds, moved, moved / seconds / bandwidth, None)


def _each(act: Callable[..., None], halves: list[tuple[Tensor, Tensor, Grid, Arrays]]) -> None:
    for half in halves:
        act(*half)


def compiled() -> None:
    """What can be told without a GPU."""
    print("No CUDA device: nothing is measured. What the compiler reports of every kernel:")
    print(f"{'kernel':<52}{'GPU':>7}{'warps':>7}{'registers':>11}{'shared B':>10}{'spilled B':>11}", flush=True)
    built = []
    for each in aot.build_all():
        built.append(asdict(each))
        print(
            f"{each.name:<52}{each.capability:>7}{each.warps:>7}{each.registers:>11}"
            f"{each.shared_bytes:>10}{each.spilled_bytes:>11}",
            flush=True,
        )
    report.save("kernels-compiled", built)


def measured() -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    bandwidth, rate = copy_bandwidth(device), matmul_rate(device)
    print(
        f"{torch.cuda.get_device_name(device)}: copy {bandwidth / 1e9:.0f} GB/s, bf16 product {rate / 1e12:.0f} TFLOP/s"
    )
    print(f"{'kernel':<56}{'us':>10}{'of limit':>10}{'torch us':>11}")
    rows = []
    for kind in (
        decode_rows(device, bandwidth), prefill_rows(device, rate), elementwise_rows(device, bandwidth),
        sampling_rows(device, bandwidth), codec_rows(device, bandwidth),
    ):  # fmt: skip
        for row in kind:
            plain = f"{1e6 * row.plain_s:11.1f}" if row.plain_s is not None else f"{'-':>11}"
            print(f"{row.name:<56}{1e6 * row.seconds:10.1f}{row.reached:10.2f}{plain}", flush=True)
            rows.append(row)
            torch.cuda.empty_cache()
    targets = {}
    for prefix, target in TARGETS.items():
        missed = [row.name for row in rows if row.name.startswith(prefix) and row.reached < target]
        targets[prefix] = {"target": target, "missed": missed}
        print(f"{prefix} at {target:.0%} of its limit: {'missed by ' + '; '.join(missed) if missed else 'met'}")
    result = {
        "gpu": torch.cuda.get_device_name(device),
        "copy_gb_s": bandwidth / 1e9,
        "matmul_tflop_s": rate / 1e12,
        "rows": [asdict(row) for row in rows],
        "targets": targets,
    }
    report.save("kernels-gpu", result)


def main() -> None:
    if torch.cuda.is_available():
        measured()
    else:
        compiled()


if __name__ == "__main__":
    main()
