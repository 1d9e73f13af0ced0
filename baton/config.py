"""One configuration, frozen, validated once, passed in slices. ``docs/config.md`` is generated from the fields here.

Sources, weakest first: defaults, the YAML file, command-line flags. Unknown keys and bad values raise
:class:`baton.errors.ConfigError` that names the key's path and what is allowed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from baton.config_admission import AdmissionConfig
from baton.config_handoff import HandoffConfig
from baton.config_observe import ObserveConfig
from baton.config_routing import RoutingConfig
from baton.config_security import IngressConfig, SecurityConfig
from baton.config_types import Count, Frozen, Seconds
from baton.errors import ConfigError


class ModelConfig(Frozen):
    id: Annotated[str, Field(min_length=1)] = Field(
        default="smollm2-135m-instruct",
        description="Embedded model name, Hugging Face folder or hub id, or a .gguf file.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Compute and KV dtype. auto: bfloat16 where the hardware multiplies it, else float32.",
    )
    cache_dir: str = Field(default="~/.cache/baton", description="Where converted models are kept.")
    max_context: Count = Field(
        default=2048, description="Longest prompt + output, in tokens; capped by the model's own."
    )


class PoolConfig(Frozen):
    replicas: Annotated[int, Field(ge=0)] = Field(default=1, description="Worker processes in this pool.")
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1,
        description="Ranks of one worker, a process each, that share every layer; divides the model's KV heads.",
    )
    page_tokens: Annotated[int, Field(ge=1, le=1024)] = Field(default=16, description="Tokens per KV page.")
    kv_tokens: Count = Field(default=16384, description="KV capacity of one worker, in tokens.")
    step_tokens: Count = Field(default=512, description="Token budget of one engine step (prefill chunks and decodes).")
    mixed_tokens: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Most prompt tokens of a step that also decodes; 0: as many as gap_ms leaves time for.",
    )
    gap_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=100.0,
        description="Prompts may stretch the gap between two tokens of a stream to this many milliseconds, or to 1.8 "
        "times the gap without prompts if that is longer. Smaller: steadier streams. Larger: earlier first tokens.",
    )
    prefix_cache: bool = Field(default=True, description="Keep KV pages for later prompts that begin alike.")
    max_running: Count = Field(default=64, description="Most sequences in one step.")
    max_waiting: Count = Field(default=256, description="Most sequences that wait; beyond it RESOURCE_EXHAUSTED.")
    threads: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Torch threads of one rank; 0: its share of the cores."
    )
    pin: bool = Field(
        default=False,
        description="Keep each worker on cores of its own, one for each thread, while there are free ones.",
    )
    cpus: Annotated[float, Field(gt=0)] = Field(default=0.5, description="Ray CPUs that one rank reserves.")
    gpus: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="GPUs that one rank reserves; 1 on a GPU, less to share it with other workers."
    )
    resources: dict[str, float] = Field(
        default_factory=dict, description="Ray custom resources that one rank reserves."
    )
    min_replicas: Count = Field(default=1, description="Autoscaling keeps at least so many workers.")
    max_replicas: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Autoscaling keeps at most so many workers; 0: always `replicas`."
    )
    target_load: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.7,
        description="Autoscaling keeps workers' mean load here. 1: every sequence slot or page is taken (decode), or "
        "a second of prompts waits (prefill).",
    )
    drain_s: Seconds = Field(
        default=30.0, description="A worker that must go has so long to finish or hand over what it holds."
    )
    surge_percent: Annotated[int, Field(ge=0, le=100)] = Field(
        default=100,
        description="Workers of the new version that an upgrade starts beside the old ones, of a hundred. 0 where "
        "there is no room for one more: an old worker then ends before its successor starts.",
    )

    @model_validator(mode="after")
    def _scaling_is_a_range(self) -> PoolConfig:
        if self.max_replicas and not self.min_replicas <= self.replicas <= self.max_replicas:
            raise ValueError(
                f"replicas {self.replicas} must lie between min_replicas {self.min_replicas} and max_replicas "
                f"{self.max_replicas}"
            )
        return self

    @model_validator(mode="after")
    def _ranks_have_whole_gpus(self) -> PoolConfig:
        if self.tensor_parallel > 1 and self.gpus not in (0.0, 1.0):
            raise ValueError(f"ranks of one worker need a GPU each: gpus is {self.gpus:g}, must be 0 or 1")
        return self

    @model_validator(mode="after")
    def _pages_fit(self) -> PoolConfig:
        if self.kv_tokens < self.page_tokens:
            raise ValueError(f"kv_tokens {self.kv_tokens} is less than one page of {self.page_tokens} tokens")
        return self


class RouterConfig(RoutingConfig):
    replicas: Count = Field(default=1, description="Router processes.")
    resources: dict[str, float] = Field(default_factory=dict, description="Ray custom resources that each reserves.")
    drain_s: Seconds = Field(default=30.0, description="A router that must go has so long to end its streams.")
    max_inflight: Count = Field(default=512, description="Most requests in one router; beyond it RESOURCE_EXHAUSTED.")
    deadline_s: Seconds = Field(
        default=600.0, description="Deadline of requests that give none, and the longest one allowed."
    )
    retries: Annotated[int, Field(ge=0, le=100)] = Field(
        default=3,
        description="After a lost worker or handoff: attempts in a row that bring no token; 0 gives up at once.",
    )
    recovery_s: Seconds = Field(
        default=30.0, description="How long a request that lost its worker waits for one that can take over."
    )
    connect_s: Seconds = Field(default=5.0, description="Longest wait for a worker's connection or answer.")
    max_request_bytes: Count = Field(default=4 << 20, description="Largest request accepted.")
    local_prefill: bool = Field(
        default=True,
        description="Whether decode workers compute prompts themselves where that gives the first token much sooner.",
    )


class Config(Frozen):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")] = Field(
        default="baton", description="Name of the cluster."
    )
    worker_host: str = Field(
        default="", description="Address that workers listen on and are reached at; empty: the address of their node."
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    prefill: PoolConfig = Field(default_factory=PoolConfig)
    decode: PoolConfig = Field(default_factory=PoolConfig)
    handoff: HandoffConfig = Field(default_factory=HandoffConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)
    admission: AdmissionConfig = Field(default_factory=AdmissionConfig)
    security: SecurityConfig = Field(default_factory=SecurityConfig)
    ingress: IngressConfig = Field(default_factory=IngressConfig)
    observe: ObserveConfig = Field(default_factory=ObserveConfig)

    @model_validator(mode="after")
    def _context_fits_pools(self) -> Config:
        if self.decode.replicas < 1:
            raise ValueError("decode.replicas must be at least 1")
        for pool in ("prefill", "decode"):
            tokens = getattr(self, pool).kv_tokens
            if tokens < self.model.max_context:
                raise ValueError(
                    f"{pool}.kv_tokens {tokens} cannot hold one model.max_context of {self.model.max_context}"
                )
        return self

    def with_flags(self, flags: dict[str, Any]) -> Config:
        """A copy with dotted ``flags`` (None values skipped) set over it, validated again."""
        tree = self.model_dump()
        for path, value in flags.items():
            if value is None:
                continue
            *parents, leaf = path.split(".")
            node = tree
            for parent in parents:
                node = node[parent]
            node[leaf] = value
        return parse(tree)


def parse(tree: Any, *, source: str = "configuration") -> Config:
    """A :class:`Config` from plain mappings; raises :class:`ConfigError` that names every bad key of the first kind."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} must be a mapping, is {type(tree).__name__}")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, source) from None


def load(path: str | os.PathLike[str] | None) -> Config:
    """The configuration in the YAML file at ``path``, or the defaults for None."""
    if path is None:
        return Config()
    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    return parse({} if tree is None else tree, source=str(path))


def _explain(error: ValidationError, source: str) -> ConfigError:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"]) or "(top level)"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"unknown key; allowed here: {', '.join(_keys_at(first['loc'][:-1]))}"
    elif not isinstance(first.get("input"), dict):
        message = f"{message}; got {first.get('input')!r}"
    others = len(error.errors()) - 1
    more = f" (and {others} more)" if others else ""
    return ConfigError(f"{message}{more} [{source}]", field=path)


def _keys_at(path: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
