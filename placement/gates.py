"""What a pool of one phase alone meets: asked before a whole cluster is simulated, and remembered.

A cluster cannot do much better than its prefill pool with decoding for nothing, nor than its decode pool to which
prompts come prefilled. That takes one simulation per pool instead of one per pair of pools, and what one pool met or
missed is known of larger and smaller ones, and of lower and higher rates. It is no strict bound, since prefill evens
out the bursts that reach decode; hence the margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from placement.cluster import Cluster
from placement.composition import Composition, Way
from placement.goodput import INSTANT, Trial, rate_at
from placement.replica import EngineLimits

MARGIN_STEPS = 2  # grid steps of the rate: a pool alone need only meet so much less

Role = Literal["prefill", "decode"]
_Pool = tuple[Role, tuple[int, int, EngineLimits]]


@dataclass(frozen=True, slots=True)
class Question:
    """Whether ``replicas`` of ``way`` meet their own part of the SLO at the rate of grid index ``step``."""

    role: Role
    way: Way
    replicas: int
    step: int

    def met(self, trial: Trial) -> bool:
        pool = self.way.pool(self.replicas)
        if self.role == "prefill":
            return trial.of_prefill().meets(Cluster(decode=INSTANT, prefill=pool), rate_at(self.step))
        return trial.meets(Cluster(decode=pool, prefill=INSTANT), rate_at(self.step))


@dataclass(frozen=True, slots=True)
class _Fact:
    replicas: int
    step: int
    met: bool


class Gates:
    """Remembers answers. More replicas and lower rates are never worse; that is assumed."""

    def __init__(self) -> None:
        self._facts: dict[_Pool, list[_Fact]] = {}

    def open(self, composition: Composition, step: int) -> tuple[Question, ...] | None:
        """What must be asked before ``composition`` is tried at ``step``; None where an answer rules it out."""
        if composition.prefill is None:
            return ()
        step -= MARGIN_STEPS
        both = (  # prefill first: its simulation has the fewest steps
            Question("prefill", composition.prefill, composition.prefills, step),
            Question("decode", composition.decode, composition.decodes, step),
        )
        known = [self._known(question) for question in both]
        if False in known:
            return None
        return tuple(question for question, answer in zip(both, known, strict=True) if answer is None)

    def learn(self, questions: Sequence[Question], answers: Sequence[bool]) -> None:
        """``answers`` to the first of ``questions``: after one that is False the rest was not asked."""
        for question, met in zip(questions, answers, strict=False):
            fact = _Fact(question.replicas, question.step, met)
            self._facts.setdefault((question.role, question.way.key), []).append(fact)

    def _known(self, question: Question) -> bool | None:
        for fact in self._facts.get((question.role, question.way.key), ()):
            if fact.met and question.replicas >= fact.replicas and question.step <= fact.step:
                return True
            if not fact.met and question.replicas <= fact.replicas and question.step >= fact.step:
                return False
        return None


def ask(questions: Sequence[Question], trial: Trial) -> tuple[bool, ...]:
    """Answers in order, up to the first that is False."""
    answers = []
    for question in questions:
        answers.append(question.met(trial))
        if not answers[-1]:
            break
    return tuple(answers)
