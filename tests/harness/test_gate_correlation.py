"""The statistics of calibration and panel against published figures, other implementations and chance; and what a
calibration in the ledger gives to whom."""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.gate.correlation import (
    Kills,
    calibration_for,
    kendall,
    kills,
    ledger_noise,
    noise_inputs,
    pooled_sigma,
    proportion,
    same_seed,
    shared_df,
    sigma_interval,
)
from harness.gate.noise import NoiseError, pool
from harness.gate.policy import Prior, from_dict, load_policy
from harness.noisebasis import prior_from_elsewhere, stale
from ledger.measured import CalibrationMeasured, EditNoise
from ledger.records import SearchStarted

SHROUT_FLEISS = [[9, 6, 8, 7, 10, 6], [2, 1, 4, 1, 5, 2], [5, 3, 6, 2, 6, 4], [8, 2, 8, 6, 9, 7]]
"""Four judges of six targets: Shrout & Fleiss (1979), table 2."""


def test_the_published_example() -> None:
    # Their ICC(3,1) is .71, from mean squares of 11.24 between targets and 1.02 residual.
    found = same_seed(SHROUT_FLEISS, 0.95)
    assert round(found.value, 2) == 0.71
    assert found.value == pytest.approx((11.24 - 1.02) / (11.24 + 3 * 1.02), abs=0.003)
    # Its limits invert (MSB / MSE) (1 - rho) / (1 + 3 rho) ~ F[5, 15]: at each limit, the F of it is a 2.5% quantile.
    for limit, quantile in ((found.low, 0.975), (found.high, 0.025)):
        assert stats.f.cdf(11.24 / 1.02 * (1 - limit) / (1 + 3 * limit), 5, 15) == pytest.approx(quantile, abs=0.002)


def test_for_two_configurations_it_is_the_variance_ratio() -> None:
    c, x = [2.51, 2.55, 2.49, 2.53, 2.60], [2.50, 2.55, 2.47, 2.52, 2.58]
    d = [a - b for a, b in zip(c, x, strict=True)]
    ratio = 1.0 - np.var(d, ddof=1) / (np.var(c, ddof=1) + np.var(x, ddof=1))
    assert same_seed([c, x]).value == pytest.approx(ratio, rel=1e-12)


def test_a_gain_plays_no_part() -> None:
    a, b = same_seed(SHROUT_FLEISS), same_seed([SHROUT_FLEISS[0], *([v + 7.25 for v in r] for r in SHROUT_FLEISS[1:])])
    assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high), rel=1e-12)


@pytest.mark.parametrize(("seeds", "configurations", "rho"), [
    (2, 2, 0.5), (4, 2, 0.3), (4, 3, 0.9), (8, 3, 0.0), (8, 3, 0.98),
])
def test_the_interval_covers_as_often_as_it_says(seeds: int, configurations: int, rho: float) -> None:
    rng, times = np.random.default_rng(seeds * 1000 + configurations), 1500
    inside = below = 0
    for _ in range(times):
        common = math.sqrt(rho) * rng.standard_normal(seeds)
        own = math.sqrt(1 - rho) * rng.standard_normal((configurations, seeds))
        found = same_seed((common + own).tolist())
        inside += found.low <= rho <= found.high
        below += rho < found.low
    assert abs(inside / times - 0.9) < 4 * math.sqrt(0.9 * 0.1 / times)
    assert abs(below / times - 0.05) < 4 * math.sqrt(0.05 * 0.95 / times)  # each tail by itself


def test_edits_of_unequal_noise_cost_little_coverage() -> None:
    # One edit three times as noisy as the other: the model is wrong, and 90% becomes no less than 85%.
    rng, times, own = np.random.default_rng(7), 1500, np.array([[1.0], [1.0], [3.0]]) * math.sqrt(0.1)
    true = 1.0 - np.mean([own[0] ** 2 + own[1] ** 2, own[0] ** 2 + own[2] ** 2]) / (2 * (0.9 + own[0, 0] ** 2))
    inside = 0
    for _ in range(times):
        found = same_seed((math.sqrt(0.9) * rng.standard_normal(8) + own * rng.standard_normal((3, 8))).tolist())
        inside += found.low <= true <= found.high
    assert 0.85 < inside / times < 0.93


def test_figures_without_spread() -> None:
    flat = same_seed([[2.5, 2.5, 2.5], [2.4, 2.4, 2.4]])
    assert (flat.value, flat.low, flat.high) == (0.0, -1.0, 1.0)  # says nothing, and claims nothing
    together = same_seed([[2.5, 2.75, 2.625], [2.0, 2.25, 2.125]])
    assert together.value == together.low == together.high == 1.0


@pytest.mark.parametrize("runs", [[], [[1.0, 2.0]], [[1.0], [2.0]], [[1.0, 2.0], [1.0]], [[1.0, math.nan], [1.0, 2.0]]])
def test_too_little_to_correlate(runs: list[list[float]]) -> None:
    with pytest.raises(NoiseError):
        same_seed(runs)


@given(st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=6), min_size=1, max_size=5))
def test_pooled_sigma_is_the_weighted_mean_variance(groups: list[list[float]]) -> None:
    sigma, df = pooled_sigma(groups)
    assert df == sum(len(g) - 1 for g in groups)
    variance = sum((len(g) - 1) * np.var(g, ddof=1) for g in groups) / df
    assert sigma == pytest.approx(math.sqrt(variance), rel=1e-9, abs=1e-12)


def test_pooled_sigma_of_nothing() -> None:
    with pytest.raises(NoiseError):
        pooled_sigma([[1.0], []])


def test_sigma_interval_covers() -> None:
    rng, inside, times = np.random.default_rng(3), 0, 2000
    for _ in range(times):
        low, high = sigma_interval(float(np.std(0.5 * rng.standard_normal(5), ddof=1)), 4)
        inside += low <= 0.5 <= high
    assert abs(inside / times - 0.9) < 4 * math.sqrt(0.09 / times)


@pytest.mark.parametrize(("seeds", "edits"), [(4, 2), (8, 2), (8, 6)])
def test_shared_df_is_that_of_the_pooled_variance(seeds: int, edits: int) -> None:
    rng, times = np.random.default_rng(9), 20_000
    runs = rng.standard_normal((times, edits + 1, seeds))
    pooled = (runs[:, :1] - runs[:, 1:]).var(axis=2, ddof=1).mean(axis=1)
    # df of a scaled chi-square: 2 mean^2 / variance; its own error here is about 2%.
    assert shared_df(seeds, edits) == pytest.approx(2 * pooled.mean() ** 2 / pooled.var(), rel=0.06)
    assert shared_df(seeds, 1) == seeds - 1


@pytest.mark.parametrize("n", [1, 3, 7, 12])
def test_proportion_never_covers_less_than_it_says(n: int) -> None:
    limits = [proportion(h, n) for h in range(n + 1)]
    for h, (low, high) in enumerate(limits):
        assert 0.0 <= low <= h / n <= high <= 1.0
    for p in np.linspace(0.01, 0.99, 60):
        covered = sum(stats.binom.pmf(h, n, p) for h, (low, high) in enumerate(limits) if low <= p <= high)
        assert covered >= 0.9 - 1e-9


def test_proportion_rule_of_three() -> None:
    # With no hit in n the upper limit is 1 - tail^(1/n); with nothing at all nothing is known.
    assert proportion(0, 29)[1] == pytest.approx(1 - 0.05 ** (1 / 29))
    assert proportion(0, 0) == (0.0, 1.0)


def count_tau_b(x: list[float], y: list[float]) -> float:
    """tau-b by its definition: concordant minus discordant over the pairs that each side can tell apart."""
    pairs = list(itertools.combinations(range(len(x)), 2))
    sign = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in pairs]
    return float(sum(a * b for a, b in sign) / math.sqrt(sum(a != 0 for a, _ in sign) * sum(b != 0 for _, b in sign)))


def test_tau_by_hand() -> None:
    # 1 2 3 4 against 1 3 2 4: five pairs agree, one does not: 4/6.
    assert kendall([1, 2, 3, 4], [1, 3, 2, 4], resamples=10).value == pytest.approx(4 / 6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=14))
def test_tau_is_scipys_and_by_its_definition(points: list[tuple[int, int]]) -> None:
    x, y = [float(a) for a, _ in points], [float(b) for _, b in points]
    found = kendall(x, y, resamples=50)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert (found.value, found.low, found.high) == (0.0, -1.0, 1.0)
        return
    assert found.value == pytest.approx(stats.kendalltau(x, y)[0], abs=1e-12)
    assert found.value == pytest.approx(count_tau_b(x, y), abs=1e-12)
    assert -1.0 <= found.low <= found.high <= 1.0


def test_the_bootstrap_is_the_plain_one() -> None:
    """The same resamples, each through scipy's own tau: the vectorised counts change nothing."""
    rng = np.random.default_rng(11)
    x, y = rng.standard_normal(9), rng.standard_normal(9)
    draws = np.random.default_rng(4).multinomial(9, np.full(9, 1 / 9), size=200)
    taus: list[Any] = [stats.kendalltau(np.repeat(x, w), np.repeat(y, w))[0] for w in draws]
    low, high = np.quantile([t for t in taus if math.isfinite(t)], [0.05, 0.95])
    found = kendall(x.tolist(), y.tolist(), resamples=200, seed=4)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_the_tau_interval_covers_roughly() -> None:
    # Bivariate normal with tau 0.6 = 2/pi asin(rho); twelve things. The percentile bootstrap is only approximate.
    rng, times, tau = np.random.default_rng(5), 400, 0.6
    rho, inside = math.sin(math.pi * tau / 2), 0
    for _ in range(times):
        x = rng.standard_normal(12)
        y = rho * x + math.sqrt(1 - rho**2) * rng.standard_normal(12)
        found = kendall(x.tolist(), y.tolist(), resamples=400)
        inside += found.low <= tau <= found.high
    assert 0.80 < inside / times < 0.97


@pytest.mark.parametrize(("x", "y"), [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, math.inf], [1.0, 2.0])])
def test_what_has_no_ranking(x: list[float], y: list[float]) -> None:
    with pytest.raises(NoiseError):
        kendall(x, y)


def test_kills_by_hand() -> None:
    gains = [0.02, 0.005, 0.001, -0.001, -0.01, -0.03]
    found = kills(gains, [False, True, True, True, True, False], 0.002)
    assert found == Kills(better=2, better_killed=1, worse=2, worse_killed=1)  # what lies within the margin is neither
    assert (found.false_kill, found.true_kill) == (0.5, 0.5)
    assert kills([-1.0], [True], 0.0).false_kill == 0.0


# -- reading calibrations -----------------------------------------------------------------------------

PARTS = {"track": "t" * 64, "data": "d" * 64, "evaluator": "e" * 64, "defaults": "f" * 64, "environment": "1" * 64}


def measured(fingerprint: str, parts: dict[str, str] = PARTS, track: str = "pocket", **change: Any) -> Any:
    body = CalibrationMeasured(
        track=track, fingerprint=fingerprint, fingerprint_parts=parts, stage="confirm", config_hash="c", commit="0",
        seeds=[1, 2, 3, 4], values=[2.51, 2.52, 2.50, 2.54], sigma_run=0.017, same_seed=[2.51, 2.51], bitwise=True,
        edits=[EditNoise(change={"beta2": 0.97}, differences=[0.001, 0.004, 0.002, 0.003], sigma_d=0.0013),
               EditNoise(change={"matrix_lr": 0.036}, differences=[0.0, 0.002, 0.001], sigma_d=0.001)],
        sigma_d=0.0012, correlation=0.9, correlation_low=0.5, correlation_high=0.99, step_ms_spread_pct=1.0,
        bytes_spread=10, seconds=100.0)
    return SimpleNamespace(type="calibration.measured", search="s", trial="",
                           body=msgspec.structs.replace(body, **change))


def started(fingerprint: str, env: dict[str, str], track: str = "pocket") -> Any:
    body = SearchStarted(track=track, fingerprint=fingerprint, fingerprint_parts={}, policy_hash="", agent="", seed=1,
                         branch="", incumbent_commit="", incumbent_config="", code_tree="", environment=env)
    return SimpleNamespace(type="search.started", search="s", trial="", body=body)


def test_the_last_calibration_of_the_very_fingerprint_counts() -> None:
    records = [measured("a"), measured("b", sigma_d=0.5), measured("a", sigma_d=0.7), measured("c")]
    found = calibration_for(records, "a")
    assert found is not None and found.sigma_d == 0.7
    assert calibration_for(records, "x") is None and calibration_for([], "a") is None


def test_stale_names_what_changed_and_nothing_else() -> None:
    env = {"torch": "2.12.0", "cpu": "model 1", "gpu": "", "numpy": "2.1"}
    records = [measured("a"), started("a", env)]
    assert stale([], "a", PARTS) == "never calibrated"
    assert stale(records, "a", PARTS) == ""
    assert stale(records, "b", PARTS, "nano") == "never calibrated"
    data = stale(records, "b", {**PARTS, "data": "x" * 64})
    assert "data: dddddddd.. -> xxxxxxxx.." in data and "scoring" not in data and "machine" not in data
    both = stale(records, "b", {**PARTS, "evaluator": "x" * 64, "defaults": "y" * 64})
    assert "scoring code" in both and "plain baseline" in both and "data" not in both
    new = {**PARTS, "environment": "2" * 64}
    torch = stale(records, "b", new, now={**env, "torch": "2.13.0"})
    assert "torch 2.12.0 -> 2.13.0" in torch and "cpu" not in torch and "numpy" not in torch
    assert torch == stale([*records, started("b", {**env, "torch": "2.13.0"})], "b", new)
    gpu = stale(records, "b", new, now={**env, "gpu": "NVIDIA H100", "cpu": "model 2"})
    assert "gpu none -> NVIDIA H100" in gpu and "cpu model 1 -> model 2" in gpu and "torch" not in gpu
    assert "machine and software" in stale([measured("a")], "b", new, now=env)  # what it was is not known


def test_stale_speaks_of_the_last_calibration() -> None:
    records = [measured("a", {**PARTS, "data": "0" * 64}), measured("b")]
    assert "data" not in stale(records, "c", {**PARTS, "evaluator": "x" * 64})


def test_noise_inputs_give_the_pool_what_was_measured() -> None:
    policy = load_policy("pocket")
    pairs, runs = noise_inputs(measured("a").body)
    assert [len(c) for c, _ in pairs] == [4, 3] and runs == []
    for (control, candidate), edit in zip(pairs, measured("a").body.edits, strict=True):
        assert [a - b for a, b in zip(control, candidate, strict=True)] == pytest.approx(edit.differences)
    noise, prior = pool(policy, pairs, runs), policy.prior
    squares = sum(sum((d - np.mean(e.differences)) ** 2 for d in e.differences) for e in measured("a").body.edits)
    df = prior.df + 3 + 2
    assert noise.df == df
    assert noise.sigma_d == pytest.approx(
        math.sqrt((prior.df * (prior.sigma_d * prior.inflation) ** 2 + squares) / df))
    assert noise.sigma_d < prior.sigma_d * prior.inflation  # quieter than shipped, and the gate learns it
    alone = measured("a", edits=[EditNoise(change={}, differences=[0.1, 0.2], sigma_d=0.07)])
    assert noise_inputs(alone.body)[1] == [[2.50, 2.54]]  # seeds that no edit ran on, once


def test_ledger_noise_takes_only_its_own_fingerprint() -> None:
    policy = load_policy("pocket")
    noise, source = ledger_noise(policy, [measured("a")], "a")
    assert noise == pool(policy, *noise_inputs(measured("a").body)) and "a calibration of 2 edits" in source
    other, source = ledger_noise(policy, [measured("a")], "b")
    assert other == pool(policy, ()) and "nothing measured" in source and policy.prior.source in source


def test_a_scale_from_elsewhere_is_doubted() -> None:
    prior = Prior(sigma_d=0.004, sigma_run=0.01, df=4.0, inflation=1.25, source="shipped")
    assert prior_from_elsewhere([measured("a", track="nano")], "pocket", prior=prior) is None
    assert prior_from_elsewhere([measured("a")], "pocket", fingerprint="a", prior=prior) is None
    found = prior_from_elsewhere([measured("a"), measured("b", sigma_d=0.002)], "pocket", fingerprint="c", prior=prior)
    assert found is not None
    assert (found.sigma_d, found.sigma_run, found.spread) == (0.002, 0.017, prior.spread)
    assert found.df < prior.df and found.inflation > prior.inflation
    assert "another fingerprint (b)" in found.source and "scale only" in found.source
    assert "2.5" not in found.source  # means never cross
    # It is a valid prior of a valid policy, also when the differences are noisier than the runs.
    wild = prior_from_elsewhere([measured("a", sigma_d=0.9, sigma_run=0.1)], "pocket", prior=prior)
    policy = dataclasses.replace(load_policy("pocket"), prior=wild)
    assert from_dict(policy.to_dict()).prior == wild
    assert prior_from_elsewhere([measured("a")], "pocket") is not None  # gate.toml's own prior is the default
