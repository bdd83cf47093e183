"""Boundaries against published tables, and against Monte Carlo."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.gate import boundaries as b
from harness.gate.policy import SPENDINGS

# Jennison & Turnbull, Group Sequential Methods (2000): tables 2.1 (Pocock) and 2.3 (O'Brien-Fleming), two-sided.
OBRIEN_FLEMING = {0.05: [1.960, 1.977, 2.004, 2.024, 2.040], 0.01: [2.576, 2.580, 2.595, 2.609, 2.621]}
POCOCK = {0.05: [1.960, 2.178, 2.289, 2.361, 2.413], 0.01: [2.576, 2.772, 2.873, 2.939, 2.986]}


@pytest.mark.parametrize(("shape", "table"), [("obrien-fleming", OBRIEN_FLEMING), ("pocock", POCOCK)])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_classic_constants_are_the_published_ones(shape: str, table: dict[float, list[float]], alpha: float) -> None:
    ours = [b.classic_constant(k, alpha, shape) for k in range(1, 6)]
    assert ours == pytest.approx(table[alpha], abs=0.0006)


def test_spending_boundaries_are_the_published_ones() -> None:
    """Five equal looks, one-sided 0.025: the values of the Lan-DeMets software and of gsDesign."""
    info = (1.0, 2.0, 3.0, 4.0, 5.0)
    late, early = [4.8769, 3.3569, 2.6803, 2.2898, 2.0310], [2.4380, 2.4268, 2.4102, 2.3966, 2.3860]
    assert b.efficacy(info, 0.025, "obrien-fleming") == pytest.approx(late, abs=2e-4)
    assert b.efficacy(info, 0.025, "pocock") == pytest.approx(early, abs=2e-4)


def test_one_look_is_the_plain_test() -> None:
    assert b.efficacy((3.0,), 0.025, "pocock") == pytest.approx((1.959964,), abs=1e-6)


def paths(info: tuple[float, ...], trials: int, drift: float, seed: int) -> np.ndarray:
    """[trials, K] Z statistics of a Brownian motion looked at at ``info``; ``drift`` = E[Z_K]."""
    rng = np.random.default_rng(seed)
    t = np.array(info) / info[-1]
    steps = np.diff(np.concatenate([[0.0], t]))
    score = np.cumsum(drift * steps + np.sqrt(steps) * rng.standard_normal((trials, len(t))), axis=1)
    return score / np.sqrt(t)


@pytest.mark.parametrize("spending", SPENDINGS)
@pytest.mark.parametrize("info", [(2.0, 3.0, 4.0), (2.0, 4.0, 5.0, 6.0, 7.0, 8.0)])
def test_alpha_is_spent_look_by_look(spending: str, info: tuple[float, ...]) -> None:
    alpha, trials = 0.05, 200_000
    z = b.efficacy(info, alpha, spending)
    crossed = np.greater(paths(info, trials, 0.0, seed=5), np.array(z))
    so_far = np.logical_or.accumulate(crossed, axis=1)
    for k, t in enumerate(info):
        spent = b.spend(spending, alpha, t / info[-1])
        error = math.sqrt(spent * (1 - spent) / trials) + 1e-9
        assert abs(float(so_far[:, k].mean()) - spent) < 4.0 * error


def test_crossing_probabilities_with_drift_and_lower_bounds_agree_with_monte_carlo() -> None:
    info, upper, lower = (1.0, 2.0, 4.0), (2.5, 2.2, 2.0), (-0.5, 0.3, 2.0)
    z = paths(info, 400_000, drift=2.5, seed=6)
    live = np.ones(len(z), dtype=bool)
    exact = b.crossing_probabilities(upper, info, drift=2.5, lower=lower)
    for k in range(3):
        up, down = live & (z[:, k] > upper[k]), live & (z[:, k] < lower[k])
        assert float(up.mean()) == pytest.approx(exact[k][0], abs=0.003)
        assert float(down.mean()) == pytest.approx(exact[k][1], abs=0.003)
        live &= ~up & ~down
    assert math.fsum(x for pair in exact for x in pair) == pytest.approx(1.0, abs=1e-9)


@given(alpha=st.floats(0.001, 0.2), spending=st.sampled_from(SPENDINGS),
       steps=st.lists(st.floats(0.2, 3.0), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_total_error_is_alpha(alpha: float, spending: str, steps: list[float]) -> None:
    info = tuple(itertools.accumulate(steps))
    z = b.efficacy(info, alpha, spending)
    total = math.fsum(up for up, _ in b.crossing_probabilities(z, info))
    assert total == pytest.approx(alpha, abs=1e-7)


def test_a_tiny_first_look_stays_finite() -> None:
    z = b.efficacy((0.01, 1.0), 0.01, "obrien-fleming")
    assert all(math.isfinite(x) for x in z) and z[0] > 6.5


@pytest.mark.parametrize(("df", "tail", "t"), [
    (3.0, 0.025, 3.182), (5.0, 0.005, 4.032), (9.0, 0.05, 1.833), (1.0, 0.05, 6.314),
])
def test_t_conversion_against_the_printed_t_table(df: float, tail: float, t: float) -> None:
    z = NormalDist().inv_cdf(1.0 - tail)
    assert b.to_t(z, df) == pytest.approx(t, abs=5e-4)
    assert b.t_upper(tail, df) == pytest.approx(t, abs=5e-4)


def test_t_conversion_tends_to_normal_and_is_wider() -> None:
    assert b.to_t(2.5, 1e7) == pytest.approx(2.5, abs=1e-5)
    assert b.to_t(2.5, 3.0) > b.to_t(2.5, 10.0) > 2.5


@pytest.mark.parametrize("bad", [
    lambda: b.efficacy((2.0, 2.0), 0.05, "pocock"), lambda: b.efficacy((), 0.05, "pocock"),
    lambda: b.efficacy((1.0,), 0.6, "pocock"), lambda: b.efficacy((1.0, 2.0), 0.05, "haybittle"),
    lambda: b.classic_constant(0, 0.05, "pocock"),
])
def test_impossible_designs_are_refused(bad: object) -> None:
    with pytest.raises(b.BoundaryError, match="valid"):
        bad()  # type: ignore[operator]
