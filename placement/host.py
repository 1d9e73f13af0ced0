"""One machine under several workers: what computes at the same time slows each other down.

With n of them in a step, each takes ``slowdown[n - 1]`` times as long as alone: they share cores, caches and memory's
bandwidth. Whenever that n changes, the rest of every step under way is stretched or shortened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

ALONE = (1.0,)  # workers whose steps do not feel each other


class Tenant(Protocol):
    def retime(self, ratio: float) -> None:
        """From now on the step under way takes ``ratio`` times the time it would have."""


class Host:
    def __init__(self, slowdown: Sequence[float] = ALONE) -> None:
        """``slowdown``: by the number of workers in a step, from one; the last one holds for more."""
        if not slowdown or min(slowdown) <= 0:
            raise ValueError("slowdown needs one positive factor at least")
        self._slowdown = tuple(slowdown)
        self._computing: list[Tenant] = []
        self.factor = self._slowdown[0]  # what a step takes now, in what it takes alone

    def began(self, tenant: Tenant) -> None:
        """``tenant`` is in a step from now on."""
        self._computing.append(tenant)
        self._stretch(tenant)

    def ended(self, tenant: Tenant) -> None:
        """``tenant`` has nothing to compute, or is gone."""
        self._computing.remove(tenant)
        self._stretch(tenant)

    def _stretch(self, cause: Tenant) -> None:
        before, self.factor = self.factor, self._factor(len(self._computing))
        ratio = self.factor / before
        if ratio != 1.0:
            for tenant in self._computing:
                if tenant is not cause:
                    tenant.retime(ratio)

    def _factor(self, computing: int) -> float:
        return self._slowdown[min(max(computing, 1), len(self._slowdown)) - 1]
