"""The decoder transformer (Llama family), over a flat batch of tokens and a paged KV cache. No Hugging Face classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baton.errors import ConfigError
from baton.layout import Dtype, KVLayout
from engine.cache import TORCH_DTYPES, KVCache
from engine.comm import Alone, Comm
from engine.ops import Linear, Ops, TorchOps
from engine.rope import rope_tables
from engine.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's rows, all sequences one after the other."""

    tokens: Tensor  # [rows]
    positions: Tensor  # [rows]
    wanted: Tensor  # [logits rows] indexes of the rows whose logits are needed
    attention: Any  # what the model's ``ops.plan`` made of the step


class Projection:
    """A matrix [outputs, inputs] and perhaps a bias: raw while weights are loaded, then packed for the hardware."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self._linear: Linear | None = None

    def pack(self, ops: Ops[Any]) -> None:
        self._linear = ops.pack(self.weight, self.bias)
        del self.weight, self.bias

    def __call__(self, x: Tensor) -> Tensor:
        assert self._linear is not None, "Model.pack comes before forward"
        return self._linear(x)


class Mlp:
    """SwiGLU, with gate and up stacked in one matrix."""

    def __init__(self, gate_up: Projection, down: Projection) -> None:
        self.gate_up, self.down = gate_up, down

    def pack(self, ops: Ops[Any]) -> None:
        self.gate_up.pack(ops)
        self.down.pack(ops)

    def __call__(self, normed: Tensor, ops: Ops[Any]) -> Tensor:
        """This rank's part [rows, hidden] of the output."""
        return self.down(ops.silu_mul(self.gate_up(normed)))


class Layer:
    """One block's share of one rank: q, k, v stacked in one matrix. A layer of experts has another ``mlp``."""

    def __init__(
        self,
        attention_norm: Tensor,
        qkv: Projection,
        out: Projection,
        mlp_norm: Tensor,
        mlp: Mlp,
        *,
        head_norms: tuple[Tensor, Tensor] | None = None,  # of queries and keys, [head_dim] each
        window: int | None = None,
    ) -> None:
        self.attention_norm, self.qkv, self.out = attention_norm, qkv, out
        self.mlp_norm, self.mlp = mlp_norm, mlp
        self.head_norms, self.window = head_norms, window

    def pack(self, ops: Ops[Any]) -> None:
        for part in (self.qkv, self.out, self.mlp):
            part.pack(ops)


class Model:
    """One rank's weights and the forward pass.

    ``engine.weights.load`` fills the weights, which start uninitialised, in ``storage`` (the checkpoint's dtype) where
    they are matrices and in ``dtype`` where they are vectors; :meth:`pack` then makes them ready for :meth:`forward`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        name: str,
        dtype: Dtype,
        device: torch.device,
        storage: torch.dtype | None = None,
        ops: Ops[Any] | None = None,
        comm: Comm | None = None,
        max_context: int | None = None,
    ) -> None:
        """``max_context``: tokens of the longest sequence that will come, if it is less than the model's own."""
        self.spec, self.dtype, self.device = spec, TORCH_DTYPES[dtype], device
        self.storage = storage or self.dtype
        self.ops: Ops[Any] = ops or TorchOps(self.dtype, device)
        self.comm = comm or Alone(device)
        self.max_context = min(spec.max_context, max_context or spec.max_context)
        self.threads = torch.get_num_threads()  # that loaded it, and that are to compute it
        self.layout = KVLayout(name, spec.layers, spec.kv_heads, spec.head_dim, dtype)
        ranks = self.comm.ranks
        self.heads, self.kv_heads = _share(spec.heads, ranks), _share(spec.kv_heads, ranks)
        self.intermediate, self.vocab = _share(spec.intermediate, ranks), _share(spec.vocab_size, ranks)
        self.embedding = self._matrix(self.vocab, spec.hidden)
        self.layers = [self._layer(index) for index in range(spec.layers)]
        self.norm = self._vector(spec.hidden)
        self.head = Projection(self.embedding if spec.tied_head else self._matrix(self.vocab, spec.hidden))
        cos, sin = rope_tables(spec, self.max_context)
        self.cos, self.sin = cos.to(device, self.dtype), sin.to(device, self.dtype)

    def pack(self) -> None:
        """Once, after loading. Layer by layer, so that at most one matrix is there twice."""
        for layer in self.layers:
            layer.pack(self.ops)
        self.head.pack(self.ops)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache, layer_written: Callable[[int], None] | None = None) -> Tensor:
        """Logits [wanted rows, vocab] of a step, on rank 0; the step's KV is in ``cache`` afterwards.

        ``layer_written(layer)`` is called when every rank has a layer's KV of all rows in its pages, before the next
        layer is computed.
        """
        ops, comm, eps, last = self.ops, self.comm, self.spec.norm_eps, len(self.layers) - 1
        rope = self.cos[batch.positions], self.sin[batch.positions]  # [rows, head_dim] each
        hidden = self._embed(batch.tokens)  # [rows, hidden]
        normed = ops.norm(hidden, self.layers[0].attention_norm, eps)
        for index, layer in enumerate(self.layers):
            attended = self._attend(layer, normed, rope, cache.layers[index], batch.attention)
            if index == last:  # only logits follow: the other rows need no output, no MLP
                hidden, attended = hidden[batch.wanted], attended[batch.wanted]
            mixed = comm.all_reduce(layer.out(attended))
            if layer_written is not None:
                layer_written(index)
            hidden, normed = ops.add_norm(hidden, mixed, layer.mlp_norm, eps)
            mixed = comm.all_reduce(layer.mlp(normed, ops))
            following = self.norm if index == last else self.layers[index + 1].attention_norm
            hidden, normed = ops.add_norm(hidden, mixed, following, eps)
        return comm.gather(self.head(normed))

    def _attend(self, layer: Layer, normed: Tensor, rope: tuple[Tensor, Tensor], pages: Tensor, plan: Any) -> Tensor:
        """[rows, heads * head_dim] of this rank; the rows' own KV is written to ``pages``."""
        qkv = layer.qkv(normed).view(-1, self.heads + 2 * self.kv_heads, self.spec.head_dim)
        if layer.head_norms is not None:
            self._norm_heads(qkv, *layer.head_norms)
        self.ops.rope_write(plan, qkv, *rope, pages)
        return self.ops.attend(plan, qkv, pages, layer.window)

    def _norm_heads(self, qkv: Tensor, query_norm: Tensor, key_norm: Tensor) -> None:
        """In place, before rotation (Qwen3). qkv: [rows, heads + 2 * kv_heads, head_dim]."""
        queries, keys, _ = torch.split(qkv, [self.heads, self.kv_heads, self.kv_heads], dim=1)
        for part, weight in ((queries, query_norm), (keys, key_norm)):
            part.copy_(self.ops.norm(part.reshape(-1, weight.shape[0]), weight, self.spec.norm_eps).view(part.shape))

    def _embed(self, tokens: Tensor) -> Tensor:
        """[rows, hidden]. Each rank looks up the tokens of its part of the vocabulary."""
        if self.comm.ranks == 1:
            return self.embedding[tokens].to(self.dtype)
        local = tokens - self.comm.rank * self.vocab
        absent = (local < 0) | (local >= self.vocab)
        rows = self.embedding[local.masked_fill(absent, 0)].to(self.dtype)
        return self.comm.all_reduce(rows.masked_fill_(absent[:, None], 0.0))

    def _layer(self, index: int) -> Layer:
        spec, head_dim = self.spec, self.spec.head_dim
        return Layer(
            self._vector(spec.hidden),
            self._projection((self.heads + 2 * self.kv_heads) * head_dim, spec.hidden, spec.qkv_bias),
            self._projection(spec.hidden, self.heads * head_dim, spec.out_bias and self.comm.rank == 0),
            self._vector(spec.hidden),
            Mlp(
                self._projection(2 * self.intermediate, spec.hidden, spec.mlp_bias),
                self._projection(spec.hidden, self.intermediate, spec.mlp_bias and self.comm.rank == 0),
            ),
            head_norms=(self._vector(head_dim), self._vector(head_dim)) if spec.qk_norm else None,
            window=spec.window(index),
        )

    def _projection(self, outputs: int, inputs: int, biased: bool) -> Projection:
        """The ranks' outputs of a matrix split by columns are added up, so that only one of them may have its bias."""
        return Projection(self._matrix(outputs, inputs), self._vector(outputs) if biased else None)

    def _matrix(self, rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=self.storage, device=self.device)

    def _vector(self, size: int) -> Tensor:
        return torch.empty(size, dtype=self.dtype, device=self.device)


def _share(whole: int, ranks: int) -> int:
    if whole % ranks:
        raise ConfigError(f"{ranks} ranks cannot share {whole} evenly", field="tensor_parallel")
    return whole // ranks
