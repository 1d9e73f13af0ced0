"""What prompt tokens and decode steps have cost lately: routers predict by it what a request would see here. Pure."""

from __future__ import annotations

HALF_LIFE_TOKENS = 512  # a chunk or two: batches and contexts change faster than that anyway
HALF_LIFE_STEPS = 128  # of decodes: seconds, in which contexts and batches change
_KEPT = 0.5 ** (1 / HALF_LIFE_STEPS)
FLAT = 0.25  # variance of batch sizes at which half of the slope that the steps suggest is believed


class PromptSpeed:
    """Decaying sums of seconds and tokens over the steps that computed prompts, whatever else those steps did."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0

    def observe(self, prompt_tokens: int, step_s: float) -> None:
        if prompt_tokens:
            kept = 0.5 ** (prompt_tokens / HALF_LIFE_TOKENS)
            self._seconds = kept * self._seconds + step_s
            self._tokens = kept * self._tokens + prompt_tokens

    @property
    def token_s(self) -> float:
        """Seconds per prompt token; 0 while no prompt was computed."""
        return self._seconds / self._tokens if self._tokens else 0.0


class StepSpeed:
    """What a step costs by the sequences that decode in it: ``step_s + sequence_s * sequences``.

    Decaying least squares over the steps that decoded, whatever else they did: a stream's gap is the whole step. While
    all batches were of one size the line is flat; it is never steeper than proportional.
    """

    def __init__(self) -> None:
        self._weight = self._sequences = self._seconds = self._squares = self._products = 0.0

    def observe(self, sequences: int, step_s: float) -> None:
        """A step that gave one token to each of ``sequences`` took ``step_s`` seconds."""
        if not sequences:
            return
        self._weight = _KEPT * self._weight + 1.0
        self._sequences = _KEPT * self._sequences + sequences
        self._seconds = _KEPT * self._seconds + step_s
        self._squares = _KEPT * self._squares + sequences * sequences
        self._products = _KEPT * self._products + sequences * step_s

    @property
    def sequence_s(self) -> float:
        """Seconds that one more sequence adds."""
        if not self._weight:
            return 0.0
        mean, mean_s = self._sequences / self._weight, self._seconds / self._weight
        variance = max(0.0, self._squares / self._weight - mean * mean)
        slope_s = (self._products / self._weight - mean * mean_s) / (variance + FLAT)
        return min(max(0.0, slope_s), mean_s / mean)

    @property
    def step_s(self) -> float:
        """Seconds of a step apart from its sequences; 0 while none decoded."""
        if not self._weight:
            return 0.0
        return max(0.0, (self._seconds - self.sequence_s * self._sequences) / self._weight)
