"""Every family and variant we read, against transformers' own class on the same random weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.errors import ConfigError
from baton.request import Sampling
from engine import weights
from engine.attention import Span
from engine.cache import KVCache
from engine.comm import Alone, Comm
from engine.model import Model
from engine.native.ops import native_ops
from engine.ops import Ops
from engine.runner import Runner, Step
from engine.spec import ModelSpec

if TYPE_CHECKING:
    from tests.unit.engine.conftest import Harness

PAGE, PROMPT, OUTPUTS, LAYERS = 4, 50, 12, 4
KINDS = ("torch", "native")
SLIDING, FULL = "sliding_attention", "full_attention"
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("Llama", {"num_key_value_heads": 4}),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-yarn-mscale": ("Llama", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}),
    "smollm": ("Llama", {"num_attention_heads": 8, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 24}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "ministral": ("Ministral", {"head_dim": 16, "sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING, FULL]}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-window": (
        "Qwen3",
        {"head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 16,
         "layer_types": [FULL, FULL, SLIDING, SLIDING]},
    ),
}  # fmt: skip
WINDOWS = {
    "mistral-window": (7, 7, 7, 7),
    "ministral": (8, None, 8, None),
    "qwen2-window": (None, None, 9, 9),
    "qwen3-window": (None, None, 16, 16),
}


@dataclass(slots=True)
class Pair:
    """The same weights twice: in transformers' class, and in ours over each kind of operations."""

    name: str
    folder: Path
    theirs: Any
    ours: dict[str, Model]
    expected: dict[tuple[int, ...], torch.Tensor]

    def logits(self, prompt: Sequence[int]) -> torch.Tensor:
        """[tokens, vocab], of one forward pass of theirs."""
        key = tuple(prompt)
        if key not in self.expected:
            with torch.no_grad():
                self.expected[key] = self.theirs(torch.tensor([prompt])).logits[0]
        return self.expected[key]

    def tokens(self, prompt: Sequence[int]) -> list[int]:
        """What their own greedy generation appends."""
        ids = torch.tensor([prompt])
        out = self.theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=OUTPUTS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    def model(self, kind: str) -> Model:
        if kind not in self.ours:
            ops = native_ops(self.ours["torch"].spec.head_dim, threads=1)
            if ops is None:
                pytest.skip("the compiled kernels cannot be had here")
            self.ours[kind] = load(self.folder, ops, Alone())
        return self.ours[kind]


def load(folder: Path, ops: Ops[Any] | None, comm: Comm) -> Model:
    spec, device = ModelSpec.from_folder(folder), torch.device("cpu")
    storage = weights.storage_dtype(folder, torch.float32)
    model = Model(spec, name="pair", dtype="float32", device=device, storage=storage, ops=ops, comm=comm)
    weights.load(model, folder)
    model.pack()
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    import transformers

    family, changes = FAMILIES[request.param]
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    torch.manual_seed(1)
    theirs = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            random = torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 1.0)
            parameter.copy_(random.bfloat16())  # which a bfloat16 checkpoint can hold
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    if family.startswith("Qwen"):
        file = folder / "model.safetensors"
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    return Pair(request.param, folder, theirs, {"torch": load(folder, None, Alone())}, {})


def logits(model: Model, prompt: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """Logits of all of ``prompt``, computed in one step for each of ``counts`` tokens, on pages in no order."""
    layout = replace(model.layout, kv_heads=model.kv_heads)
    cache = KVCache(layout, pages=32, page_tokens=PAGE, device=model.device)
    runner, rows, start = Runner(model, cache), [], 0
    pages = tuple(page * 7 % 32 for page in range(32))
    for count in counts:
        tokens, span = tuple(prompt[start : start + count]), Span(start, count, pages)
        rows.append(runner.run(Step(tokens, tuple(range(count)), (span,), int(count == 1))).clone())
        start += count
    assert start == len(prompt)
    return torch.cat(rows)


def test_the_spec_says_what_the_config_means(pair: Pair) -> None:
    spec, state = pair.model("torch").spec, pair.theirs.state_dict()
    assert spec.windows == WINDOWS.get(pair.name, ())
    assert spec.qkv_bias == ("model.layers.0.self_attn.k_proj.bias" in state)
    assert spec.out_bias == ("model.layers.0.self_attn.o_proj.bias" in state)
    assert spec.mlp_bias == ("model.layers.0.mlp.down_proj.bias" in state)
    assert spec.qk_norm == ("model.layers.0.self_attn.k_norm.weight" in state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "counts",
    [(PROMPT,), (5, 1, 20, 1, 1, 16, 5, 1), (1,) * PROMPT],
    ids=["whole", "chunked", "token by token"],
)
def test_logits_equal_transformers(pair: Pair, harness: Harness, kind: str, counts: Sequence[int]) -> None:
    prompt = harness.prompt(PROMPT)
    ours = logits(pair.model(kind), prompt, counts)
    torch.testing.assert_close(ours, pair.logits(prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_transformers(pair: Pair, harness: Harness, kind: str) -> None:
    """Prompts longer and shorter than every window, together, in chunks of at most 16 tokens."""
    prompts = {f"{length}": harness.prompt(length, seed=length) for length in (PROMPT, 20, 5, 1)}
    engine = harness.engine(pair.model(kind), page_tokens=PAGE, step_tokens=16)
    for name, prompt in prompts.items():
        engine.add(harness.work(name, prompt, Sampling(temperature=0.0, max_tokens=OUTPUTS)))
    events = harness.run(engine)
    assert {name: harness.tokens(events[name]) for name in prompts} == {
        name: pair.tokens(prompt) for name, prompt in prompts.items()
    }


class ThreadComm:
    """One of some ranks that are threads: sums and gathers go through a list and a barrier."""

    device = torch.device("cpu")

    def __init__(self, rank: int, barrier: threading.Barrier, parts: list[torch.Tensor | None]) -> None:
        self.rank, self.ranks = rank, barrier.parties
        self._barrier, self._parts = barrier, parts

    def all_reduce(self, part: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(part)).sum(dim=0)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        parts = self._exchange(part)
        return torch.cat(parts, dim=-1) if self.rank == 0 else part

    def settle(self) -> None:
        """A sum is done when its call returns."""

    def _exchange(self, part: torch.Tensor) -> list[torch.Tensor]:
        self._parts[self.rank] = part
        self._barrier.wait(30)
        parts = [part for part in self._parts if part is not None]
        self._barrier.wait(30)
        return parts


def run_ranks(ranks: int, work: Callable[[ThreadComm], torch.Tensor]) -> torch.Tensor:
    """``work`` on every rank; rank 0's result."""
    barrier = threading.Barrier(ranks)
    parts: list[torch.Tensor | None] = [None] * ranks
    comms = [ThreadComm(rank, barrier, parts) for rank in range(ranks)]
    results: dict[int, torch.Tensor] = {}

    def run(comm: ThreadComm) -> None:
        try:
            results[comm.rank] = work(comm)
        finally:
            if comm.rank not in results:
                barrier.abort()

    threads = [threading.Thread(target=run, args=(comm,)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == list(range(ranks))
    return results[0]


def test_two_ranks_hold_the_model_between_them(pair: Pair, harness: Harness) -> None:
    prompt = harness.prompt(PROMPT)
    ours = run_ranks(2, lambda comm: logits(load(pair.folder, None, comm), prompt, (30, 1, 19)))
    torch.testing.assert_close(ours, pair.logits(prompt), rtol=1e-4, atol=1e-4)


def test_ranks_that_do_not_divide_the_heads_are_refused(pair: Pair) -> None:
    with pytest.raises(ConfigError) as refused:
        load(pair.folder, None, ThreadComm(0, threading.Barrier(5), [None] * 5))
    assert refused.value.field == "tensor_parallel"
