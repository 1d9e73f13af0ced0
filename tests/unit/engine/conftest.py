"""A small random Llama as a Hugging Face folder, engines on it, and ways to run them to the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.request import Sampling, TokenEvent, Work
from engine.build import load_model
from engine.engine import Engine, LayerObserver
from engine.model import Model

TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Harness:
    """What the engine's tests do again and again."""

    @staticmethod
    def save_llama(folder: Path, **changes: Any) -> Path:
        """A random Llama with ``changes`` to the tiny config, saved by transformers itself."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**TINY, **changes}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 1.0))
        model.save_pretrained(folder)
        return folder

    @staticmethod
    def engine(
        model: Model,
        *,
        page_tokens: int = 4,
        pages: int = 128,
        step_tokens: int = 32,
        max_running: int = 16,
        max_waiting: int = 64,
        mixed_tokens: int = 0,
        prefix_cache: bool = True,
        observer: LayerObserver | None = None,
    ) -> Engine:
        return Engine(
            model,
            page_tokens=page_tokens,
            pages=pages,
            step_tokens=step_tokens,
            max_running=max_running,
            max_waiting=max_waiting,
            mixed_tokens=mixed_tokens,
            prefix_cache=prefix_cache,
            observer=observer,
        )

    @staticmethod
    def work(request_id: str, prompt: Sequence[int], sampling: Sampling | None = None, priority: int = 0) -> Work:
        """Twelve greedy tokens unless told otherwise."""
        return Work(request_id, tuple(prompt), sampling or Sampling(temperature=0.0, max_tokens=12), priority, 60.0)

    @staticmethod
    def run(engine: Engine, limit: int = 2000) -> dict[str, list[TokenEvent]]:
        """Steps until nothing is left to do; every event by request. Pages must add up after each step."""
        events: dict[str, list[TokenEvent]] = {}
        for _ in range(limit):
            if not engine.has_work:
                return events
            for event in engine.step():
                events.setdefault(event.request_id, []).append(event)
            engine.check_integrity()
        raise AssertionError(f"not done after {limit} steps")

    def alone(self, model: Model, work: Work, page_tokens: int = 4, step_tokens: int = 32) -> list[int]:
        """The tokens of ``work`` run by itself in a roomy engine."""
        engine = self.engine(model, page_tokens=page_tokens, step_tokens=step_tokens)
        engine.add(work)
        return self.tokens(self.run(engine)[work.request_id])

    @staticmethod
    def tokens(events: Sequence[TokenEvent]) -> list[int]:
        """Token ids; the output indexes must be without a gap, and only the last event may finish."""
        assert [event.index for event in events] == list(range(events[0].index, events[0].index + len(events)))
        assert not any(event.finish for event in events[:-1])
        return [event.token for event in events]

    @staticmethod
    def prompt(length: int, seed: int = 0, vocab: int = 320) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, vocab, (length,), generator=generator).tolist()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def harness() -> Harness:
    return Harness()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, harness: Harness) -> Path:
    return harness.save_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Model:
    return load_model(tiny_folder, "float32", 1)


@pytest.fixture(scope="session")
def smollm(model_folder: Path) -> Model:
    return load_model(model_folder, "float32", 1)
