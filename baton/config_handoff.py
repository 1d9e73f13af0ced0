"""How KV crosses from prefill to decode: codecs, their quality floors, transports."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from baton.config_types import Count, Frozen, Seconds

CodecName = Literal[
    "raw", "lossless", "int8", "int8-zstd", "int6", "int6-zstd", "fp8", "fp8-zstd", "int4", "int4-zstd",
    "int3-zstd", "int2", "int2-zstd",
]  # fmt: skip
CodecChoice = Literal["auto", CodecName]
TransportName = Literal["nixl", "tcp", "gloo", "nccl", "loopback"]
QualityFloor = Literal["exact", "int8", "int6", "fp8", "int4", "int3", "int2"]  # falling, as measured: ADR 8
CODECS: tuple[str, ...] = get_args(CodecName)
EXACT_CODECS: frozenset[str] = frozenset(("raw", "lossless"))  # what lands is what was sent, to the last bit
TRANSPORTS: tuple[str, ...] = get_args(TransportName)
FLOORS: tuple[str, ...] = get_args(QualityFloor)
# How far down the floors each codec lies: an entropy coded one is at least as good as the plain one of its name.
LOSS: dict[str, int] = {
    codec: 0 if codec in ("raw", "lossless") else FLOORS.index(codec.removesuffix("-zstd")) for codec in CODECS
}

AUTO = "auto"  # instead of a codec's name: any that the floor allows


def codecs_within(floor: str) -> tuple[str, ...]:
    """The codecs that ``floor`` allows, the exact ones first."""
    return tuple(codec for codec in CODECS if LOSS[codec] <= FLOORS.index(floor))


def codecs_allowed(codec: str, floor: str) -> tuple[str, ...]:
    """What a request's blocks may be encoded with: ``codec``, or for ``auto`` all that ``floor`` allows."""
    return codecs_within(floor) if codec == AUTO else (codec,)


class TlsConfig(Frozen):
    """Mutual TLS: each side shows ``cert`` and takes nobody whose certificate ``ca`` did not sign."""

    cert: str = Field(default="", description="PEM file with this worker's certificate; empty: no TLS.")
    key: str = Field(default="", description="PEM file with the certificate's private key, without a passphrase.")
    ca: str = Field(default="", description="PEM file with the authorities that sign workers' certificates, only.")

    @property
    def on(self) -> bool:
        return bool(self.cert)

    @model_validator(mode="after")
    def _all_or_none(self) -> TlsConfig:
        missing = [name for name in ("cert", "key", "ca") if not getattr(self, name)]
        if 0 < len(missing) < 3:
            raise ValueError(f"cert, key and ca belong together; missing: {', '.join(missing)}")
        return self


class HandoffConfig(Frozen):
    transport: TransportName = Field(default="nixl", description="How KV crosses from prefill to decode.")
    codec: CodecChoice = Field(
        default="auto",
        description="Codec of requests that name none. auto: whatever the quality floor allows and lands soonest.",
    )
    quality_floor: QualityFloor = Field(
        default="exact", description="Lossy codecs are refused unless this allows them; each floor allows those before."
    )
    lease_s: Seconds = Field(default=30.0, description="A reservation without a sign of life is freed after this long.")
    stall_s: Seconds = Field(default=5.0, description="A transfer that makes no progress for this long is lost.")
    landing_bytes: Count = Field(default=256 << 20, description="Landing buffers of one decode worker.")
    staging_bytes: Count = Field(default=256 << 20, description="Staged, encoded KV of one prefill worker.")
    ucx_tls: str = Field(default="", description="UCX_TLS for NIXL; empty leaves UCX's own choice.")
    tls: TlsConfig = Field(default_factory=TlsConfig, description="TLS of transport tcp.")

    @model_validator(mode="after")
    def _default_codec_meets_floor(self) -> HandoffConfig:
        if self.codec == AUTO:
            return self
        needed = FLOORS[LOSS[self.codec]]
        if FLOORS.index(self.quality_floor) < LOSS[self.codec]:
            raise ValueError(f"codec {self.codec} is lossy; set quality_floor: {needed} to allow it")
        return self

    @model_validator(mode="after")
    def _tls_has_a_transport(self) -> HandoffConfig:
        if self.tls.on and self.transport != "tcp":
            raise ValueError(f"tls protects transport tcp only, and transport is {self.transport}")
        return self
