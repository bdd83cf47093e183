"""The noise scale: laws of shrinkage and pooling."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.gate import noise as n
from harness.gate.verdict import Facts, confirm_step
from tests.harness.gate_figures import CAP, POLICY, gains

values = st.lists(st.floats(-0.05, 0.05), min_size=2, max_size=8)


@given(values, st.floats(1e-4, 0.1), st.floats(0.5, 50.0))
def test_shrunk_variance_lies_between_own_and_pooled(x: list[float], sigma0: float, df0: float) -> None:
    own = statistics.stdev(x)
    sigma, df = n.shrink(sigma0, df0, own**2 * (len(x) - 1), len(x) - 1)
    assert min(own, sigma0) * (1 - 1e-9) <= sigma <= max(own, sigma0) * (1 + 1e-9)
    assert df == pytest.approx(df0 + len(x) - 1)


def test_mean_over_shrunk_error_is_student_t_when_variances_follow_the_prior() -> None:
    """sigma^2 ~ df0 s0^2 / chi2(df0): then mean / (s / sqrt n) has exactly df0 + n - 1 degrees of freedom."""
    rng, df0, s0, size, trials = np.random.default_rng(3), 3.0, 0.01, 3, 200_000
    sigma = s0 * np.sqrt(df0 / rng.chisquare(df0, trials))
    x = sigma[:, None] * rng.standard_normal((trials, size))
    s2 = (df0 * s0**2 + x.var(axis=1, ddof=1) * (size - 1)) / (df0 + size - 1)
    example = n.shrink(s0, df0, float(x[0].var(ddof=1)) * (size - 1), size - 1)
    assert example[0] ** 2 == pytest.approx(s2[0])
    t = x.mean(axis=1) / np.sqrt(s2 / size)
    for tail, quantile in ((0.05, 2.015), (0.01, 3.365), (0.005, 4.032)):  # printed t table, 5 degrees of freedom
        assert float((t > quantile).mean()) == pytest.approx(tail, abs=4 * math.sqrt(tail / trials))


def test_shipped_scale_is_the_inflated_prior() -> None:
    noise = n.shipped(POLICY)
    assert noise.sigma_d == pytest.approx(0.004 * 1.25) and noise.sigma_run == pytest.approx(0.0105 * 1.25)
    assert noise.correlation == pytest.approx(POLICY.prior.correlation) and noise.trials == 0


def test_pool_tends_to_the_true_scales() -> None:
    """300 trials with known scales: the prior washes out, the correlation is found."""
    rng = np.random.default_rng(1)
    shared, own = 0.008, 0.002
    trials = []
    for _ in range(300):
        luck = shared * rng.standard_normal(4)
        trials.append((list(luck + own * rng.standard_normal(4)), list(luck - 0.1 + own * rng.standard_normal(4))))
    noise = n.pool(POLICY, trials)
    assert noise.sigma_d == pytest.approx(own * math.sqrt(2), rel=0.1)
    assert noise.sigma_run == pytest.approx(math.hypot(shared, own), rel=0.1)
    assert noise.correlation == pytest.approx(shared**2 / (shared**2 + own**2), abs=0.03)
    assert noise.df == POLICY.pool_df_cap and noise.trials == 300


def test_an_exploding_trial_does_not_blind_the_gate() -> None:
    calm = [([2.0, 2.01, 2.0, 2.02], [1.99, 2.004, 1.997, 2.01])] * 5
    before = n.pool(POLICY, calm)
    after = n.pool(POLICY, [*calm, ([2.0, 2.0, 2.0, 2.0], [2.0, 9.0, 3.0, 2.0])])
    assert after.clipped == 1 and after.sigma_d < 2.0 * before.sigma_d


def test_single_pairs_teach_nothing_and_the_order_does_not_matter() -> None:
    trials = [([2.0, 2.1, 2.2], [2.0, 2.15, 2.1]), ([2.0, 2.2], [1.9, 2.15]), ([2.0], [1.0])]
    assert n.pool(POLICY, trials[:2]) == n.pool(POLICY, trials)
    a, b = n.pool(POLICY, trials), n.pool(POLICY, trials[::-1])
    assert a.sigma_d == pytest.approx(b.sigma_d) and a.df == b.df


def test_pool_from_verdicts_equals_pool_from_figures() -> None:
    control, candidate = gains([0.004, -0.002, 0.003, 0.001])
    decided = confirm_step(POLICY, control, candidate, n.shipped(POLICY), Facts(cap_bytes=CAP))
    by_hand = n.pool(POLICY, [([r.val_bpb for r in control], [r.val_bpb for r in candidate])])
    assert n.pool_decided(POLICY, [decided]) == by_hand
    assert n.pool_decided(POLICY, []) == n.shipped(POLICY)


def test_control_runs_alone_inform_the_run_scale_only() -> None:
    base, more = n.shipped(POLICY), n.pool(POLICY, (), [[2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]])
    assert more.sigma_run < base.sigma_run and more.sigma_d == base.sigma_d


def test_form_follows_the_pooled_correlation() -> None:
    noise = n.Noise(sigma_d=1.0, df=9.0, sigma_run=1.0, run_df=9.0)  # rho 0.5
    assert n.form(POLICY, noise) == "paired"
    assert n.form(POLICY, dataclasses.replace(noise, sigma_d=1.3)) == "two-sample"  # rho 0.155


def test_noise_survives_its_record() -> None:
    noise = n.pool(POLICY, [([2.0, 2.1], [2.0, 2.05])])
    assert n.noise_from_dict(noise.to_dict()) == noise


@pytest.mark.parametrize("change", [{"sigma_d": math.nan}, {"sigma_d": 0.0}, {"df": -1.0}, {"what": 1.0}])
def test_impossible_noise_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(n.NoiseError, match=next(iter(change))):
        n.noise_from_dict(n.shipped(POLICY).to_dict() | change)


@pytest.mark.parametrize("trial", [([2.0, 2.1], [2.0]), ([2.0, math.nan], [2.0, 2.0])])
def test_impossible_trials_are_refused(trial: tuple[list[float], list[float]]) -> None:
    with pytest.raises(n.NoiseError):
        n.pool(POLICY, [trial])
