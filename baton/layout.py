"""The shape of one sequence's KV cache, and the fingerprint by which two workers know that they agree on it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

Dtype = Literal["float32", "bfloat16"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2}
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """One token's KV: ``layers`` times K and V of ``kv_heads`` x ``head_dim`` values of ``dtype``.

    ``model`` identifies the weights (a digest of the config and the weight files' sizes and names): KV of one model
    is never decoded into another. Page size is *not* part of the layout: each worker has its own.
    """

    model: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: Dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's KV over all layers."""
        return self.layers * self.layer_token_bytes

    @property
    def layer_token_bytes(self) -> int:
        """Bytes of one token's K and V in one layer."""
        return 2 * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def fingerprint(self) -> str:
        """16 hex digits that differ when any field differs."""
        return _digest(f"{self.model}|{self.layers}|{self.kv_heads}|{self.head_dim}|{self.dtype}")

    @property
    def family(self) -> str:
        """16 hex digits that two workers must share to hand KV over: all but the dtype, which the receiver converts."""
        return _digest(f"{self.model}|{self.layers}|{self.kv_heads}|{self.head_dim}")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
