from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.grids import Floats, Grid, HeldOut, Posynomial, rising


def _kernel(points: Floats) -> Floats:
    """A launch, bytes and FLOPs, added up."""
    m, n = points.T
    seconds: Floats = 5e-6 + 2e-9 * n + 2e-11 * m * n
    return seconds


def _grid(noise: float = 0.0, hole: bool = False) -> Grid:
    nodes = [2.0**i for i in range(0, 15)]
    points = np.array([p for p in product(nodes, nodes) if not (hole and p[0] > 1000 and p[1] > 1000)])
    wobble = np.exp(noise * np.random.default_rng(1).standard_normal(len(points)))
    return Grid.of_rows(("m", "n"), points, _kernel(points) * wobble, (2, 2), (0.3, 0.3))


def test_posynomial_finds_sum_of_power_laws() -> None:
    grid = _grid()
    points = np.array([[3.0, 900.0], [5000.0, 11.0], [16000.0, 16000.0], [1.0, 1.0]])
    fitted = np.exp(grid.roofline.log_s(np.log(points)))
    assert fitted == pytest.approx(_kernel(points), rel=0.1)


def test_estimate_between_nodes_is_near_what_was_sampled() -> None:
    points = np.exp(np.random.default_rng(2).uniform(0, np.log(16000), (200, 2)))
    estimate = _grid().estimate(points)
    assert HeldOut.of(estimate.seconds, _kernel(points)).p95 < 0.02
    assert not estimate.extrapolated.any()


def test_noise_is_smoothed_not_reproduced() -> None:
    points = np.array(list(product([2.0**i for i in range(2, 13)], repeat=2)))
    estimate = _grid(noise=0.1).estimate(points)
    noisy_rows = np.median(np.abs(np.exp(0.1 * np.random.default_rng(1).standard_normal(10000)) - 1))
    assert HeldOut.of(estimate.seconds, _kernel(points)).median < noisy_rows


@pytest.mark.parametrize(
    ("point", "outside"),
    [((1.0, 1.0), False), ((16384.0, 500.0), False), ((16385.0, 500.0), True), ((0.5, 8.0), True)],
)
def test_points_beyond_the_nodes_are_flagged(point: tuple[float, float], outside: bool) -> None:
    assert _grid().estimate(np.array([point])).extrapolated.tolist() == [outside]


def test_points_in_a_hole_are_flagged_and_still_follow_the_roofline() -> None:
    grid = _grid(hole=True)
    points = np.array([[400.0, 400.0], [1500.0, 400.0], [1500.0, 1500.0], [9000.0, 9000.0]])
    estimate = grid.estimate(points)
    assert estimate.extrapolated.tolist() == [False, False, True, True]
    assert estimate.seconds == pytest.approx(_kernel(points), rel=0.3)


def test_held_out_error_grows_with_the_noise_and_never_sees_its_rows() -> None:
    quiet, loud = _grid(noise=0.0).held_out(), _grid(noise=0.2).held_out()
    assert quiet.median < 0.02
    assert quiet.rows == loud.rows == 225
    # Independent noise cannot be predicted: what was held out errs at least about as much as the noise itself.
    assert loud.median > 0.8 * 0.2 * 0.6745


def test_rows_of_one_point_are_averaged() -> None:
    nodes = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    points = np.array([[n] for n in nodes for _ in range(2)])
    seconds = np.array([n * factor for n in nodes for factor in (0.5, 2.0)])
    grid = Grid.of_rows(("n",), points, seconds, (1,), (0.1,))
    assert np.exp(grid.log_s) == pytest.approx(nodes)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=40))
def test_rising_is_monotone_keeps_the_mean_and_leaves_monotone_values(values: list[float]) -> None:
    result = rising(np.array(values))
    assert (np.diff(result) >= -1e-9).all()
    assert result.mean() == pytest.approx(np.mean(values), abs=1e-6)
    assert rising(np.sort(values)) == pytest.approx(np.sort(values))


def test_fit_of_one_power_law_is_exact() -> None:
    x = np.log(np.random.default_rng(0).uniform(1, 1e4, (300, 1)))
    fit = Posynomial.fit(x, 1.5 * x[:, 0] - 3)
    assert fit.log_s(x) == pytest.approx(1.5 * x[:, 0] - 3, abs=0.02)
