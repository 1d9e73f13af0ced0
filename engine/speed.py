"""What a prompt token has cost lately: by this routers predict when a prompt would be done here. Pure."""

from __future__ import annotations

HALF_LIFE_TOKENS = 512  # a chunk or two: batches and contexts change faster than that anyway


class PromptSpeed:
    """Decaying sums of seconds and tokens over the steps that computed prompts, whatever else those steps did."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0

    def observe(self, prompt_tokens: int, step_s: float) -> None:
        kept = 0.5 ** (prompt_tokens / HALF_LIFE_TOKENS)
        self._seconds = kept * self._seconds + step_s * (prompt_tokens > 0)
        self._tokens = kept * self._tokens + prompt_tokens

    @property
    def token_s(self) -> float:
        """Seconds per prompt token; 0 while no prompt was computed."""
        return self._seconds / self._tokens if self._tokens else 0.0
