"""What ``baton profile`` measured on one machine, as a file and as a cost model.

The engine's step has the terms of :mod:`placement.roofline`; here their sizes are fitted to measured steps instead of
summed from kernels. With N rows (chunk tokens and decodes), K chunks, B decodes, C = sum(contexts), and chunks of
``count`` tokens after ``start``:

    T = t_0 + f(N) + t_K K + t_B B + t_C C + a sum(count^2)/2 + b sum(count start) + c sum(start + count | start > 0)

f is piecewise linear and rising: projections, MLP and head, bound by the weights' bytes at few rows and by arithmetic
at many. a is causal attention inside a chunk, b attention over what came before it, c the gathering of a chunk's
earlier KV. All coefficients are non-negative, so T rises in each argument; they minimise relative errors, robustly,
because a step that something else interrupted must not bend the others.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from baton.config_handoff import AUTO, EXACT_CODECS
from baton.errors import ConfigError
from placement.cost import StepShape
from placement.grids import Floats, HeldOut
from placement.handoff_cost import HandoffCost, choose

FORM = 1
KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_SWEEPS = 20000
_SETTLED = 1e-9
_ROBUST = 0.1  # relative residuals above this count by their size, not by its square (Huber, 1964)
_REWEIGHTED = 5
LEAST_STEPS = 40  # fewer do not determine the coefficients


@dataclass(frozen=True, slots=True)
class Observation:
    """One step's shape and the median of its ``repeats``; ``spread`` is the interquartile range over that median."""

    step: StepShape
    seconds: float
    spread: float
    repeats: int


@dataclass(frozen=True, slots=True)
class Speed:
    """What one layer of one prompt costs: ``layer_s + raw_bytes / bytes_per_s``."""

    layer_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class CodecSpeed:
    """``encode`` gathers from pages, encodes and signs; ``decode`` checks, decodes and writes into pages."""

    encode: Speed
    decode: Speed
    ratio: float  # raw bytes over wire bytes


@dataclass(frozen=True, slots=True)
class Machine:
    processor: str
    accelerator: str  # "" on CPU
    cores: int
    platform: str
    torch: str


@dataclass(frozen=True, slots=True)
class Profile:
    """Everything that one run measured. ``complete`` is False when it was interrupted."""

    machine: Machine
    date: str  # ISO 8601, UTC
    model: str
    fingerprint: str  # of the KV layout: model, shape and dtype
    dtype: str
    threads: int
    layers: int
    token_bytes: int
    page_tokens: int
    complete: bool
    clock: str  # "wall" or "cpu": which seconds ``steps`` hold
    cpu_share: float  # of the cores that the steps' threads had; see ``placement.measure.Steps``
    steps: tuple[Observation, ...]
    codecs: Mapping[str, CodecSpeed]
    wires: Mapping[str, Speed]  # transport -> between two processes of this machine, of wire bytes
    beside: float = 1.0  # how many times as long a step takes while one other worker of this machine computes

    def slowdown(self, workers: int, taken_cores: float = 0.0) -> tuple[float, ...]:
        """How many times longer a step takes with 1 to ``workers`` of them computing on this machine than alone.

        taken_cores: by what is no worker. It comes first (``engine.threads.give_way``); workers share what is left as
        soon as their threads outnumber it. Beside that, two were measured to slow each other down, and more are taken
        to do so as two do. Raises :class:`ConfigError` where nothing is left.
        """
        if taken_cores >= self.machine.cores:
            raise ConfigError(f"{taken_cores:g} of {self.machine.cores} cores leave none", field="taken_cores")
        left, pair = self.machine.cores - taken_cores, max(1.0, 2 * self.threads / self.machine.cores)
        crowded = [max(1.0, count * self.threads / left) for count in range(1, workers + 1)]
        return tuple(share * (max(1.0, self.beside / pair) if at else 1.0) for at, share in enumerate(crowded))

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Raises :class:`ConfigError` when ``path`` holds no profile of this form."""
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the profile {path}: {error}", field="profile") from None
        if not isinstance(tree, dict) or tree.get("form") != FORM:
            raise ConfigError(f"{path} is not a profile of form {FORM}", field="profile")
        try:
            return _from_tree(tree)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the profile {path} is damaged: {error!r}", field="profile") from None

    def save(self, path: str | Path) -> None:
        tree = {"form": FORM, **asdict(self)}
        tree["steps"] = [
            [list(map(list, o.step.chunks)), list(o.step.contexts), o.seconds, o.spread, o.repeats] for o in self.steps
        ]
        body = ",\n".join(f" {json.dumps(key)}: {_lines(value)}" for key, value in tree.items())
        Path(path).write_text(f"{{\n{body}\n}}\n", encoding="utf-8")


def _lines(value: Any) -> str:
    """JSON with one step to a line, so that two profiles can be compared by eye and by diff."""
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"


def _from_tree(tree: Mapping[str, Any]) -> Profile:
    steps = tuple(
        Observation(
            StepShape(tuple((int(a), int(b)) for a, b in chunks), tuple(map(int, contexts))),
            float(seconds), float(spread), int(repeats),
        )
        for chunks, contexts, seconds, spread, repeats in tree["steps"]
    )  # fmt: skip
    codecs = {
        name: CodecSpeed(Speed(**entry["encode"]), Speed(**entry["decode"]), float(entry["ratio"]))
        for name, entry in tree["codecs"].items()
    }
    rest = {key: value for key, value in tree.items() if key not in ("form", "machine", "steps", "codecs", "wires")}
    wires = {name: Speed(**entry) for name, entry in tree["wires"].items()}
    return Profile(machine=Machine(**tree["machine"]), steps=steps, codecs=codecs, wires=wires, **rest)


@dataclass(frozen=True, slots=True)
class StepFit:
    """Coefficients of the formula above; ``slopes[i]`` is f's from ``KNOTS[i]`` (from 0 for the first) to the next."""

    base_s: float
    chunk_s: float
    decode_s: float
    context_s: float
    inside_s: float
    before_s: float
    gather_s: float
    slopes: tuple[float, ...]

    @classmethod
    def of(cls, steps: Sequence[Observation]) -> StepFit:
        seconds = np.array([o.seconds for o in steps])
        features = np.array([_features(o.step) for o in steps]) / seconds[:, None]
        weights = np.ones_like(seconds)
        for _ in range(_REWEIGHTED):
            values = non_negative(features * weights[:, None], weights)
            weights = np.sqrt(_ROBUST / np.maximum(_ROBUST, np.abs(features @ values - 1)))
        base, chunk, decode, context, inside, before, gather, *slopes = values.tolist()
        return cls(base, chunk, decode, context, inside, before, gather, tuple(slopes))

    def seconds(self, step: StepShape) -> float:
        values = (
            self.base_s, self.chunk_s, self.decode_s, self.context_s, self.inside_s, self.before_s, self.gather_s,
            *self.slopes,
        )  # fmt: skip
        return math.fsum(a * b for a, b in zip(values, _features(step), strict=True))

    def rows_s(self, rows: int) -> float:
        """f of the formula."""
        return math.fsum(a * b for a, b in zip(self.slopes, _hinges(rows), strict=True))


def _features(step: StepShape) -> list[float]:
    rows = len(step.contexts) + sum(count for _, count in step.chunks)
    inside = sum(count * count for _, count in step.chunks) / 2
    before = sum(start * count for start, count in step.chunks)
    gathered = sum(start + count for start, count in step.chunks if start)
    head = [1.0, len(step.chunks), len(step.contexts), sum(step.contexts), inside, before, gathered]
    return [*map(float, head), *_hinges(rows)]


def _hinges(rows: int) -> list[float]:
    """How much of each segment between knots ``rows`` covers."""
    edges = (0, *KNOTS[1:])
    return [
        float(min(rows, above) - below if rows > below else 0)
        for below, above in zip(edges, (*edges[1:], rows + 1), strict=True)
    ]


def non_negative(features: Floats, target: Floats) -> Floats:
    """argmin |features x - target|, x >= 0, by coordinate descent on scaled columns; exact at convergence."""
    scale = np.linalg.norm(features, axis=0)
    used = scale > 0
    columns = features[:, used] / scale[used]
    gram, right = columns.T @ columns, columns.T @ target
    x = np.zeros(columns.shape[1])
    for _ in range(_SWEEPS):
        moved = 0.0
        for i in range(x.size):
            new = max(0.0, x[i] + float(right[i] - gram[i] @ x))
            moved, x[i] = max(moved, abs(new - x[i])), new
        if moved < _SETTLED:
            break
    solution = np.zeros(features.shape[1])
    solution[used] = x / scale[used]
    return solution


def held_out(steps: Sequence[Observation], folds: int = 5, seed: int = 0) -> HeldOut:
    """Every step predicted by a fit of the other folds alone."""
    fold = np.random.default_rng(seed).integers(0, folds, len(steps))
    predicted = np.empty(len(steps))
    for one in range(folds):
        fit = StepFit.of([step for step, f in zip(steps, fold, strict=True) if f != one])
        for at in np.flatnonzero(fold == one).tolist():
            predicted[at] = fit.seconds(steps[at].step)
    return HeldOut.of(predicted, np.array([step.seconds for step in steps]))


class ProfiledReplica:
    """A :class:`placement.cost.SummedCostModel` of one worker of the machine that was profiled.

    ``extrapolations`` counts steps with more rows or longer contexts than any that was measured.
    """

    gpus = 1

    def __init__(self, profile: Profile, *, codec: str, transport: str, kv_tokens: int) -> None:
        """Raises :class:`ConfigError` for a codec or transport that was not measured, or too few steps."""
        if len(profile.steps) < LEAST_STEPS:
            raise ConfigError(f"has {len(profile.steps)} steps, a fit needs {LEAST_STEPS}", field="profile.steps")
        self.profile = profile
        self.fit = StepFit.of(profile.steps)
        self._handoffs = handoffs_of(profile, codec, transport)
        self.extrapolations: Counter[str] = Counter()
        self._kv_tokens = kv_tokens
        self._most_rows = max(_rows(o.step) for o in profile.steps)
        self._longest = max(max((*o.step.contexts, *(a + b for a, b in o.step.chunks))) for o in profile.steps)
        self._rows_s = array("d", [self.fit.rows_s(rows) for rows in range(2 * self._most_rows + 1)])

    def step_s(self, step: StepShape) -> float:
        chunks, batch = step.chunks, len(step.contexts)
        if not chunks:
            return self.decode_step_s(batch, sum(step.contexts))
        fit = self.fit
        rows, seconds = batch, fit.base_s + fit.chunk_s * len(chunks)
        for start, count in chunks:
            rows += count
            seconds += count * (fit.inside_s / 2 * count + fit.before_s * start)
            if start:
                seconds += fit.gather_s * (start + count)
            if start + count > self._longest:
                self.extrapolations["longer contexts than measured"] += 1
        if batch:
            seconds += fit.decode_s * batch + fit.context_s * sum(step.contexts)
        return seconds + self._rows(rows)

    def decode_step_s(self, batch: int, context_sum: int) -> float:
        if not batch:
            return 0.0
        if context_sum > batch * self._longest:
            self.extrapolations["longer contexts than measured"] += 1
        fit = self.fit
        return fit.base_s + fit.decode_s * batch + fit.context_s * context_sum + self._rows(batch)

    def transfer_s(self, tokens: int) -> float:
        return self._handoff(tokens).serial_s(tokens) if tokens > 0 else 0.0

    def exposed_transfer_s(self, tokens: int) -> float:
        return self._handoff(tokens).exposed_s(tokens, self._prefill_s(tokens)) if tokens > 0 else 0.0

    def kv_tokens(self) -> int:
        return self._kv_tokens

    def _prefill_s(self, tokens: int) -> float:
        return self.step_s(StepShape(((0, tokens),), ()))

    def _handoff(self, tokens: int) -> HandoffCost:
        """With the codec that the sender's own chooser takes for a prompt of so many tokens."""
        if len(self._handoffs) == 1:
            return next(iter(self._handoffs.values()))
        return self._handoffs[choose(self._handoffs, tokens, self._prefill_s(tokens))]

    def _rows(self, rows: int) -> float:
        if rows > self._most_rows:
            self.extrapolations["more rows in a step than measured"] += 1
        return self._rows_s[rows] if rows < len(self._rows_s) else self.fit.rows_s(rows)


def handoffs_of(profile: Profile, codec: str, transport: str) -> dict[str, HandoffCost]:
    """By codec the profile's handoff over one transport: of "auto" all exact ones, among which the sender chooses.

    Raises :class:`ConfigError` if a codec or the transport was not measured.
    """
    names = [name for name in profile.codecs if name in EXACT_CODECS] if codec == AUTO else [codec]
    return {name: _handoff_of(profile, name, transport) for name in names or ["lossless"]}


def _handoff_of(profile: Profile, codec: str, transport: str) -> HandoffCost:
    if codec not in profile.codecs:
        raise ConfigError(f"{codec!r} was not measured; {', '.join(profile.codecs) or 'none'} were", field="codec")
    if transport not in profile.wires:
        measured = ", ".join(profile.wires) or "none"
        raise ConfigError(f"{transport!r} was not measured; {measured} were", field="transport")
    speed, wire = profile.codecs[codec], profile.wires[transport]
    return HandoffCost(
        token_bytes=profile.token_bytes,
        layers=profile.layers,
        wire_bytes_per_s=wire.bytes_per_s,
        encode_bytes_per_s=speed.encode.bytes_per_s,
        decode_bytes_per_s=speed.decode.bytes_per_s,
        ratio=speed.ratio,
        encode_layer_s=speed.encode.layer_s,
        wire_layer_s=wire.layer_s,
        decode_layer_s=speed.decode.layer_s,
    )


def _rows(step: StepShape) -> int:
    return len(step.contexts) + sum(count for _, count in step.chunks)
