"""What a simulated worker learns of its own steps: the engine's own meters, told of simulated times."""

from __future__ import annotations

from collections.abc import Sequence

from engine.pace import Pace
from engine.speed import PromptSpeed, StepSpeed


class Meters:
    """The speeds that a worker pushes with its load, and how much prompt a step that also decodes may hold."""

    def __init__(self, *, step_tokens: int, mixed_tokens: int, gap_s: float) -> None:
        """As :class:`engine.engine.Engine` has them; mixed_tokens 0 leaves it to :class:`engine.pace.Pace`."""
        self.prompts, self.steps = PromptSpeed(), StepSpeed()
        self._step_tokens, self._fixed = step_tokens, mixed_tokens
        self._pace = None if mixed_tokens else Pace(gap_s)

    @property
    def mixed_tokens(self) -> int:
        """Prompt tokens for the next step if it also decodes."""
        return self._fixed if self._pace is None else self._pace.mixed_tokens(self._step_tokens)

    def stepped(self, decodes: int, prompt_tokens: int, step_s: float) -> None:
        """As the engine notes it after every step."""
        self.prompts.observe(prompt_tokens, step_s)
        self.steps.observe(decodes, step_s)
        if self._pace is not None:
            self._pace.observe(decodes, prompt_tokens, step_s)

    def decoded(self, decodes: int, started_s: float, ends_s: Sequence[float]) -> None:
        """Steps that only gave one token each to the same ``decodes`` sequences, one right after the other."""
        steps, pace = self.steps, self._pace
        for ended_s in ends_s:  # no prompts: nothing for their speed
            step_s = ended_s - started_s
            steps.observe(decodes, step_s)
            if pace is not None:
                pace.observe(decodes, 0, step_s)
            started_s = ended_s
