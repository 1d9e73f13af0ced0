"""What ``baton profile`` measured on one machine, as a file and as a cost model."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from baton.config_handoff import AUTO, EXACT_CODECS
from baton.errors import ConfigError
from placement.cost import StepShape
from placement.handoff_cost import HandoffCost, choose
from placement.host import SharedMachine
from placement.step_fit import LEAST_STEPS, Observation, fitted, rows

FORM = 2


@dataclass(frozen=True, slots=True)
class Speed:
    """What one layer of one prompt costs: ``layer_s + raw_bytes / bytes_per_s``."""

    layer_s: float
    bytes_per_s: float

    def slowed(self, times: float) -> Speed:
        return Speed(times * self.layer_s, self.bytes_per_s / times)


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
class Serving:
    """Seconds that a worker adds to its engine's steps; ``placement.measure_served`` measures them on real workers."""

    chunk_s: float = 0.0  # a chunk of prompt whose KV leaves behind it, layer by layer
    step_s: float = 0.0  # a step whose tokens go to clients


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
    serving: Serving = Serving()
    pulse_s: float = 0.0  # of the machine during the steps, see ``placement.pulse``; 0: it was not read
    longer: float = 1.0  # how many times as long as ``steps`` say they take at this pulse

    def at(self, pulse_s: float) -> Profile:
        """What this machine would have shown with that pulse. Raises :class:`ConfigError` for a profile without one."""
        if not self.pulse_s:
            raise ConfigError("the profile has no pulse", field="profile.pulse_s")
        longer = pulse_s / self.pulse_s
        return replace(
            self,
            pulse_s=pulse_s,
            longer=longer * self.longer,
            serving=Serving(**{name: longer * seconds for name, seconds in asdict(self.serving).items()}),
            codecs={
                name: replace(one, encode=one.encode.slowed(longer), decode=one.decode.slowed(longer))
                for name, one in self.codecs.items()
            },
            wires={name: one.slowed(longer) for name, one in self.wires.items()},
        )

    def shared(self, taken_cores: float = 0.0, *, request_s: float = 0.0, token_s: float = 0.0) -> SharedMachine:
        """This machine, for workers that share it.

        taken_cores: by what is no worker and has nothing to do with requests. ``request_s``, ``token_s``: what these
        cost beside their steps. How many times longer a second worker makes a step was measured, the share of cores
        that it takes included. Raises :class:`ConfigError` where nothing is left.
        """
        if taken_cores >= self.machine.cores:
            raise ConfigError(f"{taken_cores:g} of {self.machine.cores} cores leave none", field="taken_cores")
        crowded = max(1.0, 2 * self.threads / self.machine.cores)
        return SharedMachine(
            self.machine.cores - taken_cores,
            self.threads,
            pair=max(1.0, self.beside / crowded),
            request_s=request_s,
            token_s=token_s,
        )

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
    apart = ("form", "machine", "steps", "codecs", "wires", "serving")
    rest = {key: value for key, value in tree.items() if key not in apart}
    wires = {name: Speed(**entry) for name, entry in tree["wires"].items()}
    serving = Serving(**tree.get("serving", {}))
    return Profile(machine=Machine(**tree["machine"]), steps=steps, codecs=codecs, wires=wires, serving=serving, **rest)


class ProfiledReplica:
    """A :class:`placement.cost.CostModel` of one worker of the machine that was profiled.

    ``extrapolations`` counts steps with more rows or longer contexts than any that was measured.
    """

    gpus = 1

    def __init__(self, profile: Profile, *, codec: str, transport: str, kv_tokens: int, sends: bool = False) -> None:
        """``sends``: a prefill worker, whose KV leaves behind its steps; else its tokens go to clients.

        Raises :class:`ConfigError` for a codec or transport that was not measured, or too few steps.
        """
        if len(profile.steps) < LEAST_STEPS:
            raise ConfigError(f"has {len(profile.steps)} steps, a fit needs {LEAST_STEPS}", field="profile.steps")
        self.profile = profile
        self.fit = fitted(profile.steps).times(profile.longer)
        self._handoffs = handoffs_of(profile, codec, transport)
        self.extrapolations: Counter[str] = Counter()
        self._kv_tokens, self._sends = kv_tokens, sends
        self._most_rows = max(rows(o.step) for o in profile.steps)
        self._longest = max(max((*o.step.contexts, *(a + b for a, b in o.step.chunks))) for o in profile.steps)
        self._rows_s = array("d", [self.fit.rows_s(rows) for rows in range(2 * self._most_rows + 1)])

    def sum_s(self, chunks: Sequence[tuple[int, int]], batch: int, context_sum: int) -> float:
        if not chunks:
            return self.decode_step_s(batch, context_sum)
        fit, serving = self.fit, self.profile.serving
        rows, seconds = batch, fit.base_s + fit.chunk_s * len(chunks)
        if self._sends:
            seconds += serving.chunk_s * len(chunks)
        else:
            seconds += serving.step_s
        for start, count in chunks:
            rows += count
            seconds += count * (fit.inside_s / 2 * count + fit.before_s * start)
            if start:
                seconds += fit.gather_s * (start + count)
            if start + count > self._longest:
                self.extrapolations["longer contexts than measured"] += 1
        if batch:
            seconds += fit.decode_s * batch + fit.context_s * context_sum
        return seconds + self._rows(rows)

    def decode_step_s(self, batch: int, context_sum: int) -> float:
        if not batch:
            return 0.0
        if context_sum > batch * self._longest:
            self.extrapolations["longer contexts than measured"] += 1
        fit = self.fit
        seconds = fit.base_s + fit.decode_s * batch + fit.context_s * context_sum + self._rows(batch)
        return seconds + self.profile.serving.step_s

    def transfer_s(self, tokens: int) -> float:
        return self._handoff(tokens).serial_s(tokens) if tokens > 0 else 0.0

    def exposed_transfer_s(self, tokens: int) -> float:
        return self._handoff(tokens).exposed_s(tokens, self._prefill_s(tokens)) if tokens > 0 else 0.0

    def kv_tokens(self) -> int:
        return self._kv_tokens

    def _prefill_s(self, tokens: int) -> float:
        return self.sum_s(((0, tokens),), 0, 0)

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
