"""What is known of a machine, a model, a worker and a pair of workers before anything is judged."""

from __future__ import annotations

from dataclasses import dataclass

from baton.host import HostFacts
from baton.layout import KVLayout
from baton.messages import Hello, ProbeLanded, ProbeSent


@dataclass(frozen=True, slots=True)
class Package:
    """One of Baton's own requirements, as it is installed here."""

    requirement: str  # "torch==2.13.0"
    installed: str  # version; empty when it is not
    fits: bool


@dataclass(frozen=True, slots=True)
class Torch:
    """What a fresh Python process says after importing torch."""

    version: str  # empty when the import failed
    cuda: str  # the CUDA that it was built for; empty for none
    devices: int  # that it can use
    error: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    memory_bytes: int
    memory_free_bytes: int
    tmp: str  # where Ray puts its files
    tmp_bytes: int
    tmp_free_bytes: int
    compiler: str  # path; empty when there is none


@dataclass(frozen=True, slots=True)
class Port:
    key: str  # ingress.grpc_port
    number: int
    host: str
    holder: str  # "pid 7 (python)"; empty when it is free
    ours: bool  # held by the running local cluster of this name
    error: str  # why it cannot be bound although nobody holds it


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """``folder`` is empty when the model is not on this machine yet; ``problem`` says what is wrong with it."""

    model_id: str
    folder: str
    cached: bool = False  # the folder is Baton's own copy, which can be made again
    problem: str = ""
    weight_bytes: int = 0
    kv_heads: int = 0
    layout: KVLayout | None = None


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as it answered, or why it did not."""

    name: str
    role: str  # "prefill" or "decode"
    address: str
    error: str = ""
    hello: Hello | None = None
    host: HostFacts | None = None
    rtt_s: float = 0.0
    ahead_s: float = 0.0  # its clock before ours


@dataclass(frozen=True, slots=True)
class Direction:
    """One probe: who sent, who landed, and what both said; or ``error``. ``busy``: it was refused for being busy."""

    codec: str
    sent: ProbeSent | None = None
    landed: ProbeLanded | None = None
    error: str = ""
    busy: bool = False

    @property
    def bytes_per_s(self) -> float:
        """KV before encoding; 0 without a measurement."""
        return self.sent.kv_bytes / self.sent.seconds if self.sent is not None and self.sent.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Pair:
    """``forward``: prefill to decode in raw, then in the configured codec; ``back``: the other way in raw."""

    prefill: Worker
    decode: Worker
    forward: tuple[Direction, ...]
    back: Direction | None
