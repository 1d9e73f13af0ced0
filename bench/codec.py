"""The codec ladder on a model's real KV: bits a value, what they cost in quality, and speed of one core.

`python -m bench.codec quality` prefills a prefix of English text, sends its KV through each codec, and scores the text
that follows. `python -m bench.codec speed` times encoding and decoding. Both read CPython's own documentation topics.

KV is rounded to bfloat16 first, as it is stored on accelerators: bits are of 16, and differences are against the raw
bfloat16 KV.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pydoc_data import topics
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor

from baton.config import Config
from baton.config_handoff import CODECS
from baton.layout import Dtype, KVLayout
from bench import report
from engine import hub
from engine.attention import Span
from engine.build import load_model
from engine.cache import KVCache
from engine.model import Model
from engine.runner import Runner, Step
from engine.text import Tokenizer
from kvtransfer.codecs import Codec, make_codec
from kvtransfer.codecs.even import EVEN
from kvtransfer.protocol import block_tokens

CHUNK = 512
REPEATS = 5
SPEED_TOKENS = 640

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@dataclass(slots=True)
class Score:
    """Sums over evaluated tokens, and encoded sizes of the prefixes."""

    tokens: int = 0
    loss: float = 0.0  # negative log-likelihood of the text, less that of raw KV
    divergence: float = 0.0  # KL from raw KV's distribution
    agreed: int = 0  # equal most likely token
    exact: bool = True  # every decoded bit
    values: int = 0  # encoded
    bits: dict[str, int] = field(default_factory=dict)  # by codec: with and without entropy coding

    def add(self, other: Score) -> None:
        self.tokens += other.tokens
        self.loss += other.loss
        self.divergence += other.divergence
        self.agreed += other.agreed
        self.exact &= other.exact
        self.values += other.values
        for name, bits in other.bits.items():
            self.bits[name] = self.bits.get(name, 0) + bits

    def result(self) -> dict[str, Any]:
        return {
            "bits_per_value": {name: bits / self.values for name, bits in self.bits.items()},
            "perplexity_change_percent": 100 * math.expm1(self.loss / self.tokens),
            "kl_nats": self.divergence / self.tokens,
            "top1_agreement": self.agreed / self.tokens,
            "bit_exact": self.exact,
            "evaluated_tokens": self.tokens,
        }


class Subject:
    """One sequence of a model: its prefix's KV can be replaced before the text that follows is scored."""

    def __init__(self, model: Model, prefix: int, scored: int) -> None:
        self.layout = KVLayout("codec", model.spec.layers, model.spec.kv_heads, model.spec.head_dim, "bfloat16")
        tokens = prefix + scored
        self._pages = tuple(range(-(-tokens // 16)))
        self.cache = KVCache(model.layout, pages=len(self._pages), page_tokens=16, device=model.device)
        self._runner = Runner(model, self.cache)
        self._prefix = prefix

    def prefill(self, tokens: Sequence[int]) -> list[Tensor]:
        """The prefix's KV by layer, rounded to bfloat16: [prefix, 2 * kv_heads, head_dim]."""
        for start in range(0, self._prefix, CHUNK):
            part = tokens[start : min(start + CHUNK, self._prefix)]
            self._step(part, start, (len(part) - 1,))
        return [layer[: self._prefix].bfloat16().cpu() for layer in self.cache.layers]

    def score(self, layers: Sequence[Tensor], tokens: Sequence[int]) -> Tensor:
        """Log-probabilities [scored, vocab] after each of ``tokens``, which follow a prefix of this KV."""
        for layer, kv in zip(self.cache.layers, layers, strict=True):
            layer[: self._prefix] = kv.to(layer)
        return self._step(tokens, self._prefix, tuple(range(len(tokens)))).float().log_softmax(-1)

    def _step(self, tokens: Sequence[int], start: int, wanted: tuple[int, ...]) -> Tensor:
        return self._runner.run(Step(tuple(tokens), wanted, (Span(start, len(tokens), self._pages),), 0))


def through(codec: Codec, layout: KVLayout, kv: Tensor) -> tuple[Tensor, int]:
    """``kv`` [tokens, 2 * kv_heads, head_dim] encoded and decoded in a handoff's blocks, and the encoded bits."""
    count, most, bits, parts = kv.shape[0], block_tokens(layout), 0, []
    room = memoryview(bytearray(codec.bound(most)))
    for start in range(0, count, most):
        keys, values = kv[start : start + most].chunk(2, dim=1)
        some = keys.shape[0]
        nbytes = codec.encode(keys, values, room, before=start, after=count - start - some)
        parts.append(torch.cat(codec.decode(room[:nbytes], some), dim=1))
        bits += 8 * nbytes
    return torch.cat(parts), bits


def levels() -> dict[str, list[str]]:
    """Codecs by what they decode to: some differ in size alone."""
    found: dict[str, list[str]] = {}
    for name in CODECS:
        found.setdefault(name if name in EVEN else name.removesuffix("-zstd"), []).append(name)
    return found


@dataclass(frozen=True, slots=True)
class Plan:
    """``segments`` places of a text, each ``prefix`` tokens whose KV is sent and ``scored`` after them."""

    prefix: int
    scored: int
    segments: int


class Bench:
    """Scores every level at places of a text."""

    def __init__(self, model: Model, text: Sequence[int], plan: Plan) -> None:
        self._subject, self._text = Subject(model, plan.prefix, plan.scored), text
        self._prefix, self._scored = plan.prefix, plan.scored
        self._codecs = {name: make_codec(name, self._subject.layout) for name in CODECS}

    def segment(self, start: int) -> dict[str, Score]:
        part = self._text[start : start + self._prefix + self._scored + 1]
        follow, target = part[self._prefix : -1], torch.tensor(part[self._prefix + 1 :])[:, None]
        kv = self._subject.prefill(part)
        want = self._subject.score(kv, follow)
        scores = {level: self._score(kv, names) for level, names in levels().items()}
        found = {}
        for level, (score, decoded) in scores.items():
            got = want if score.exact else self._subject.score(decoded, follow)
            score.tokens = self._scored
            score.values = self._prefix * self._subject.layout.token_bytes // 2
            score.loss = float((want.gather(1, target) - got.gather(1, target)).sum())
            score.divergence = float((want.exp() * (want - got)).sum())
            score.agreed = int((want.argmax(1) == got.argmax(1)).sum())
            found[level] = score
        return found

    def _score(self, kv: Sequence[Tensor], names: Sequence[str]) -> tuple[Score, list[Tensor]]:
        """Sizes of the encoded prefix, and what it decodes to."""
        score, decoded = Score(), []
        for name in names:
            pairs = [through(self._codecs[name], self._subject.layout, layer) for layer in kv]
            decoded = [layer for layer, _ in pairs]
            score.bits[name] = sum(bits for _, bits in pairs)
        score.exact = all(
            torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(kv, decoded, strict=True)
        )
        return score, decoded


def measure(model: Model, text: Sequence[int], plan: Plan, parts: Path, stop_at_s: float) -> dict[str, Any]:
    """Results of every level over the segments that are finished when ``stop_at_s`` (of the process's clock) comes.

    Every finished segment is kept in ``parts``, where the next run finds it.
    """
    bench, totals = None, {level: Score() for level in levels()}
    spare = len(text) - plan.prefix - plan.scored - 1
    for index in range(plan.segments):
        kept = parts / f"{plan.prefix}-{plan.scored}-{index}-of-{plan.segments}.json"
        if not kept.exists():
            if time.monotonic() > stop_at_s:
                continue
            bench = bench or Bench(model, text, plan)
            scores = bench.segment(index * spare // max(1, plan.segments - 1))
            kept.write_text(json.dumps({level: asdict(score) for level, score in scores.items()}), encoding="utf-8")
            print(f"prefix {plan.prefix}: segment {index + 1} of {plan.segments}", flush=True)
        for level, score in json.loads(kept.read_text(encoding="utf-8")).items():
            totals[level].add(Score(**score))
    return {level: total.result() for level, total in totals.items() if total.tokens}


def time_s(codec: Codec, keys: Tensor, values: Tensor) -> tuple[float, float, int]:
    """Best seconds to encode and to decode one block, and its bytes."""
    count, encode_s, decode_s = keys.shape[0], [], []
    room = memoryview(bytearray(codec.bound(count)))
    for _ in range(REPEATS):
        started_s = time.perf_counter()
        nbytes = codec.encode(keys, values, room)
        encoded_s = time.perf_counter()
        codec.decode(room[:nbytes], count)
        encode_s.append(encoded_s - started_s)
        decode_s.append(time.perf_counter() - encoded_s)
    return min(encode_s), min(decode_s), nbytes


def speeds(model: Model, text: Sequence[int], dtype: Dtype) -> Iterator[tuple[str, dict[str, float]]]:
    """GB/s of input (and of output) on one core, by codec, the median over layers of each one's best; and bits a value.

    The model computes in float32: float32 KV has all its mantissa bits.
    """
    subject = Subject(model, SPEED_TOKENS, 1)
    subject.prefill(text)
    shape = (model.spec.layers, model.spec.kv_heads, model.spec.head_dim)
    for name in CODECS:
        codec, times, raw = make_codec(name, KVLayout("codec", *shape, dtype)), [], 0
        for layer in subject.cache.layers:
            kv = layer[:SPEED_TOKENS].to(torch.float32 if dtype == "float32" else torch.bfloat16)
            keys, values = (part.contiguous() for part in kv.chunk(2, dim=1))
            raw = 2 * keys.numel() * keys.element_size()
            times.append(time_s(codec, keys, values))
        encode_s, decode_s, nbytes = (statistics.median(each) for each in zip(*times, strict=True))
        bits = 8 * nbytes / (raw / keys.element_size())
        yield name, {
            "encode_gb_per_s": raw / encode_s / 1e9, "decode_gb_per_s": raw / decode_s / 1e9, "bits_per_value": bits,
        }  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> None:
    """Divergence against bits a value: one line a prefix, one point a level with its smallest codec."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for prefix, rungs in result.items():
        lossy = [(min(one["bits_per_value"].values()), one["kl_nats"], level) for level, one in rungs.items()]
        points = sorted(point for point in lossy if point[1] > 0)
        axis.plot([bits for bits, _, _ in points], [kl for _, kl, _ in points], "o-", label=f"{prefix} tokens")
        for bits, kl, level in points:
            axis.annotate(level, (bits, kl), textcoords="offset points", xytext=(6, 4), fontsize="small")
    axis.set(yscale="log", xlabel="bits a value, all metadata included (bfloat16 has 16)", ylabel="KL from raw (nats)")
    axis.legend(title="prefix")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def subject_of() -> tuple[Model, list[int]]:
    config = Config().model
    folder = hub.resolve(config.id, Path(config.cache_dir).expanduser())
    text = "\n".join(str(topics.topics[name]) for name in sorted(topics.topics))
    return load_model(folder, "float32", 1), Tokenizer(folder).encode(text)


@app.command()
def quality(
    short: Annotated[int, typer.Option(help="Segments of the short prefix (768 tokens), 512 scored tokens each.")] = 16,
    long: Annotated[int, typer.Option(help="Segments of the long prefix (4096 tokens).")] = 16,
    scored: Annotated[int, typer.Option(help="Scored tokens of one segment.")] = 512,
    parts: Annotated[Path, typer.Option(help="Finished segments are kept here.")] = Path("build/codec-quality"),
    minutes: Annotated[float, typer.Option(help="No segment starts later; the next run goes on.")] = math.inf,
) -> None:
    """Bits a value, perplexity, KL and top-1 agreement of every level."""
    stop_at_s = time.monotonic() + 60 * minutes
    model, text = subject_of()
    parts.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    for plan in (Plan(768, scored, short), Plan(4096, scored, long)):
        if found := measure(model, text, plan, parts, stop_at_s):
            result[str(plan.prefix)] = found
    draw(result, report.save("codec-quality", result).with_suffix(".png"))
    for prefix, rungs in result.items():
        for level, one in rungs.items():
            sizes = ", ".join(f"{name} {value:.2f}" for name, value in one["bits_per_value"].items())
            print(f"{prefix:5} {level:9} {one['perplexity_change_percent']:+8.3f} % KL {one['kl_nats']:.5f} "
                  f"top-1 {one['top1_agreement']:.4f} bits: {sizes}")  # fmt: skip


@app.command()
def speed() -> None:
    """GB/s of one core, by codec, for float32 and bfloat16 KV."""
    torch.set_num_threads(1)
    model, text = subject_of()
    result = {dtype: dict(speeds(model, text, dtype)) for dtype in ("float32", "bfloat16")}
    report.save("codec-speed", result)
    for dtype, codecs in result.items():
        for name, one in codecs.items():
            print(f"{dtype:9} {name:10} encode {one['encode_gb_per_s']:6.2f} decode {one['decode_gb_per_s']:6.2f} GB/s "
                  f"{one['bits_per_value']:5.2f} bits")  # fmt: skip


if __name__ == "__main__":
    app()
