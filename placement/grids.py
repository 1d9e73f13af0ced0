"""Measured kernel times as a function: a fitted roofline, its residual interpolated, and the error of both held out.

Along every axis a kernel's work is a power, so what bounds it is a monomial: launching 1, moving bytes, multiplying.
Their sum is a smooth roofline, a posynomial (Boyd et al., 2007), fitted to the table:

    T(x) = sum_k exp(a_k + b_k . log x)             k = 1..3, coefficients free

What the table has beyond that (tile and wave effects, protocol changes) is its residual in logarithms. It is fitted by
a plane over the neighbouring nodes, weighted by exp(-distance): a local regression (Cleveland & Devlin, 1988). That
smooths instead of passing through every row because the tables are noisy: rows of the H200 GEMM table that differ by
one in ``m`` differ by 4 % (median) and 21 % (p95). Outside the grid the residual is kept as it is at the border, and
the roofline alone extrapolates.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

TERMS = 3  # a fourth gained less than a tenth of a percent on every H200 table
_POINTS = 4096  # solved at once: bounds the working memory
_RIDGE = 1e-2  # defines the slopes of a plane over too few neighbours; small beside the weights of real ones
_ROBUST = 0.03  # residuals above this count by their size, not by its square
_ITERATIONS = 60


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Relative errors of rows that the fit had not seen."""

    rows: int
    median: float
    p95: float
    worst: float

    @classmethod
    def of(cls, predicted: Floats, measured: Floats) -> HeldOut:
        errors = np.abs(predicted / measured - 1)
        median, p95, worst = (float(value) for value in np.percentile(errors, (50, 95, 100)))
        return cls(errors.size, median, p95, worst)

    def __str__(self) -> str:
        return f"median {self.median:.1%}, p95 {self.p95:.1%}, worst {self.worst:.0%} of {self.rows} rows"


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of some points, and which of them lie outside the cells whose corners were all measured."""

    seconds: Floats
    extrapolated: Flags


@dataclass(frozen=True, slots=True)
class Posynomial:
    """``terms``: [terms, 1 + axes], a_k then b_k of the sum above."""

    terms: Floats

    @classmethod
    def fit(cls, log_x: Floats, log_t: Floats) -> Posynomial:
        """log_x: [rows, axes], log_t: [rows]. Levenberg-Marquardt with weights that bound an outlier's pull."""
        design = np.concatenate([np.ones((len(log_x), 1)), log_x], axis=1)
        terms = _initial(design, log_t)
        predicted, shares = _log_sum(design, terms)
        loss, damping = np.abs(log_t - predicted).sum(), 1e-2
        for _ in range(_ITERATIONS):
            residual = log_t - predicted
            slopes = (shares[:, :, None] * design[:, None, :]).reshape(len(design), -1)
            weighted = slopes / np.maximum(np.abs(residual), _ROBUST)[:, None]
            normal, right = weighted.T @ slopes, weighted.T @ residual
            damped = normal + damping * np.diag(np.diag(normal) + 1e-6)
            proposed = terms + np.linalg.solve(damped, right).reshape(terms.shape)
            new_predicted, new_shares = _log_sum(design, proposed)
            new_loss = np.abs(log_t - new_predicted).sum()
            if not new_loss < loss:
                damping *= 4
                continue
            settled = loss - new_loss < 1e-5 * loss
            terms, predicted, shares, loss = proposed, new_predicted, new_shares, new_loss
            damping = max(damping / 3, 1e-6)
            if settled:
                break
        return cls(terms)

    def log_s(self, log_x: Floats) -> Floats:
        return _log_sum(np.concatenate([np.ones((len(log_x), 1)), log_x], axis=1), self.terms)[0]


def _initial(design: Floats, log_t: Floats) -> Floats:
    """The launch term at the fastest rows, the others as power laws of the slower and of the slowest rows."""
    order = np.argsort(log_t)
    terms = np.zeros((TERMS, design.shape[1]))
    terms[0, 0] = np.quantile(log_t, 0.02)
    for k in range(1, TERMS):
        slow = order[len(order) * k // TERMS :]
        terms[k] = np.linalg.lstsq(design[slow], log_t[slow], rcond=None)[0]
        terms[k, 0] -= np.log(TERMS - 1) / 2
    return terms


def _log_sum(design: Floats, terms: Floats) -> tuple[Floats, Floats]:
    """log of the sum of the terms [rows], and each term's share of it [rows, terms]."""
    logs = design @ terms.T
    top = logs.max(axis=1, keepdims=True)
    parts = np.exp(logs - top)
    total = parts.sum(axis=1, keepdims=True)
    return (top + np.log(total))[:, 0], parts / total


@dataclass(frozen=True, slots=True)
class Grid:
    """``log_s[i, j, ...]`` is the logarithm of the seconds at ``nodes[0][i], nodes[1][j], ...``; NaN if not measured.

    ``reach`` is how many nodes to either side take part, ``scale`` the distance (in natural logarithms) at which a
    neighbour's weight has fallen to 1/e; one of each per axis.
    """

    axes: tuple[str, ...]
    nodes: tuple[Floats, ...]
    log_s: Floats
    roofline: Posynomial
    reach: tuple[int, ...]
    scale: tuple[float, ...]

    @classmethod
    def of_rows(
        cls, axes: tuple[str, ...], points: Floats, seconds: Floats, reach: tuple[int, ...], scale: tuple[float, ...]
    ) -> Grid:
        """From rows: points [rows, axes], seconds [rows]. Rows at one point are averaged (geometrically)."""
        nodes = tuple(np.unique(points[:, axis]) for axis in range(len(axes)))
        index = tuple(np.searchsorted(nodes[axis], points[:, axis]) for axis in range(len(axes)))
        total, rows = np.zeros([n.size for n in nodes]), np.zeros([n.size for n in nodes])
        np.add.at(total, index, np.log(seconds))
        np.add.at(rows, index, 1)
        log_s = np.where(rows > 0, total / np.maximum(rows, 1), np.nan)
        return cls(axes, nodes, log_s, Posynomial.fit(np.log(points), np.log(seconds)), reach, scale)

    def estimate(self, points: Floats) -> Estimate:
        """points: [count, axes], all positive."""
        points = np.atleast_2d(np.asarray(points, dtype=np.float64))
        return Estimate(np.exp(self._predict(self._residual(), points)), ~self._enclosed(points))

    def held_out(self, folds: int = 5, seed: int = 0) -> HeldOut:
        """Every row predicted from the other folds alone, the roofline's fit included."""
        index, points, measured = self._rows()
        fold = np.random.default_rng(seed).integers(0, folds, len(index))
        predicted = np.empty_like(measured)
        for one in range(folds):
            hidden = fold == one
            seen = self.log_s.copy()
            seen[tuple(index[hidden].T)] = np.nan
            roofline = Posynomial.fit(np.log(points[~hidden]), measured[~hidden])
            partial = Grid(self.axes, self.nodes, seen, roofline, self.reach, self.scale)
            predicted[hidden] = partial._predict(partial._residual(), points[hidden])
        return HeldOut.of(np.exp(predicted), np.exp(measured))

    def _rows(self) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
        """Index [rows, axes], point [rows, axes] and log seconds [rows] of everything measured."""
        index = np.argwhere(np.isfinite(self.log_s))
        points = np.stack([self.nodes[axis][index[:, axis]] for axis in range(len(self.axes))], axis=1)
        return index, points, self.log_s[tuple(index.T)]

    def _residual(self) -> Floats:
        index, points, measured = self._rows()
        residual = np.full_like(self.log_s, np.nan)
        residual[tuple(index.T)] = measured - self.roofline.log_s(np.log(points))
        return residual

    def _predict(self, residual: Floats, points: Floats) -> Floats:
        """log seconds [count] of points [count, axes]."""
        low, high = (np.array([nodes[end] for nodes in self.nodes]) for end in (0, -1))
        log_inside = np.log(np.clip(points, low, high))
        parts = [self._plane(residual, log_inside[at : at + _POINTS]) for at in range(0, len(points), _POINTS)]
        return self.roofline.log_s(np.log(points)) + np.concatenate(parts)

    def _plane(self, residual: Floats, log_points: Floats) -> Floats:
        """Intercepts [count] of the local planes around log_points [count, axes]."""
        padded = np.pad(residual, [(r, r) for r in self.reach], constant_values=np.nan)
        logs = [np.pad(np.log(n), r, mode="edge") for n, r in zip(self.nodes, self.reach, strict=True)]
        offsets = np.array(list(product(*(range(2 * r + 1) for r in self.reach))))  # [neighbours, axes]
        index, away = [], []
        for axis, nodes in enumerate(self.nodes):
            middles = (np.log(nodes[1:]) + np.log(nodes[:-1])) / 2
            nearest = np.searchsorted(middles, log_points[:, axis])
            index.append(nearest[:, None] + offsets[None, :, axis])  # [count, neighbours]
            away.append(logs[axis][index[axis]] - log_points[:, axis, None])
        values, offset = padded[tuple(index)], np.stack(away, axis=2)
        known = np.isfinite(values)
        distance = np.where(known, np.sqrt(((offset / np.array(self.scale)) ** 2).sum(axis=2)), np.inf)
        closest = distance.min(axis=1, keepdims=True)
        weight = np.where(known, np.exp(np.where(np.isfinite(closest), closest, 0.0) - distance), 0.0)
        design = np.concatenate([np.ones((*values.shape, 1)), offset], axis=2)
        weighted = design * weight[:, :, None]
        normal = weighted.transpose(0, 2, 1) @ design + np.diag([1e-9] + [_RIDGE] * len(self.axes))
        right = (weighted * np.where(known, values, 0.0)[:, :, None]).sum(axis=1)
        intercepts: Floats = np.linalg.solve(normal, right[:, :, None])[:, 0, 0]
        return intercepts

    def _enclosed(self, points: Floats) -> Flags:
        inside: Flags = np.ones(len(points), dtype=np.bool_)
        low = []
        for axis, nodes in enumerate(self.nodes):
            values = points[:, axis]
            inside &= (values >= nodes[0]) & (values <= nodes[-1])
            low.append(np.clip(np.searchsorted(nodes, values, side="right") - 1, 0, nodes.size - 1))
        for corner in product((0, 1), repeat=len(self.nodes)):
            index = [
                np.minimum(at + step * (points[:, axis] > nodes[at]), nodes.size - 1)
                for axis, (step, at, nodes) in enumerate(zip(corner, low, self.nodes, strict=True))
            ]
            inside &= np.isfinite(self.log_s[tuple(index)])
        return inside


def rising(values: Floats) -> Floats:
    """The non-decreasing sequence closest to ``values`` (least squares; pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []  # mean and length
    for value in values.tolist():
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (left, wide), (right, narrow) = blocks[-2:]
            blocks[-2:] = [((left * wide + right * narrow) / (wide + narrow), wide + narrow)]
    return np.repeat([mean for mean, _ in blocks], [length for _, length in blocks])
