"""Error rates: simulation against the verdict itself, against alpha, and against laws; the search for a policy."""

from __future__ import annotations

import dataclasses
import math

import msgspec
import numpy as np
import pytest

from harness.gate.boundaries import efficacy
from harness.gate.design import (
    ENOUGH_TRIALS,
    TARGETS,
    Grid,
    Targets,
    achieved,
    basis,
    design,
    goals,
    own_effects,
    target_gain,
)
from harness.gate.noise import Noise, pool_decided, shipped
from harness.gate.policy import load_policy, tracks
from harness.gate.simulate import (
    Costs,
    Mix,
    Proposals,
    Sums,
    World,
    bank_spread,
    breadth_passes,
    breadth_tau,
    draw,
    false_share,
    judge,
    judge_two_sample,
    propose,
    rates,
    reach,
    sequential,
    summary,
)
from harness.gate.verdict import Facts, breadth_verdict, confirm_step
from ledger.records import CalibrationMeasured, Decided
from tests.harness.gate_figures import CAP, POLICY, gains, sides

FREE = dataclasses.replace(POLICY, price_mb=0.0, price_time=0.0)
NARROW = Grid(looks=((2, 3, 4), (2, 4, 6, 8)), alphas=(0.01, 0.4), spendings=("power-1.5",), shrink_dfs=(2.0,),
              futilities=(0.1,), vetoes=(1.0,))
UNPAIRED = Noise(sigma_d=0.02, df=20.0, sigma_run=0.01, run_df=20.0)


def test_the_simulated_gate_is_the_gate_paired() -> None:
    rng = np.random.default_rng(2)
    control = 2.3 + 0.01 * rng.standard_normal((300, 4))
    d = draw(FREE, 0.008, 300, rng)
    kept, used = judge(FREE, shipped(FREE), d)
    assert 0.1 < kept.mean() < 0.9
    for i in range(300):
        decided = confirm_step(FREE, *sides(list(control[i]), list(control[i] - d[i])), shipped(FREE),
                               Facts(cap_bytes=CAP))
        assert (decided.verdict == "keep", decided.looks[-1].n) == (kept[i], used[i])


def test_the_simulated_gate_is_the_gate_two_sample() -> None:
    rng = np.random.default_rng(3)
    policy = dataclasses.replace(FREE, looks=(2, 4, 6), controls=5, futility_power=0.1)
    control, candidate = 2.3 + 0.01 * rng.standard_normal((300, 6)), 2.28 + 0.01 * rng.standard_normal((300, 6))
    kept, used = judge_two_sample(policy, UNPAIRED, control, candidate)
    assert 0.1 < kept.mean() < 0.9 and len(set(used)) == 3
    for i in range(300):
        decided = confirm_step(policy, *sides(list(control[i]), list(candidate[i])), UNPAIRED, Facts(cap_bytes=CAP))
        assert (decided.verdict == "keep", decided.looks[-1].n) == (kept[i], used[i])


@pytest.mark.parametrize("spending", ["obrien-fleming", "pocock", "power-1.5"])
@pytest.mark.parametrize("looks", [(2, 3, 4), (2, 4, 6, 8)])
@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_false_keeps_stay_within_alpha_though_sigma_is_unknown(
    spending: str, looks: tuple[int, ...], alpha: float
) -> None:
    """Sigmas drawn as the shrinkage assumes, no futility to help. No gain: within alpha. At the very edge of
    the null (gain = materiality): within alpha and the 15% that ``to_t`` owns up to.
    """
    policy = dataclasses.replace(FREE, spending=spending, looks=looks, alpha=alpha, futility_power=0.0)
    noise, trials = shipped(policy), 100_000
    rng = np.random.default_rng(11)
    sigma = noise.sigma_d * np.sqrt(policy.shrink_df / rng.chisquare(policy.shrink_df, trials))
    null = sigma[:, None] * rng.standard_normal((trials, looks[-1]))
    error = math.sqrt(alpha * (1 - alpha) / trials)
    assert float(judge(policy, noise, null)[0].mean()) <= alpha + 3 * error
    edge = float(judge(policy, noise, null + policy.materiality_bpb)[0].mean())
    assert edge <= 1.15 * alpha + 3 * error
    assert edge > 0.9 * alpha, "and alpha is spent, not wasted"


def test_normal_boundaries_with_an_estimated_sigma_would_lie() -> None:
    """What the t conversion is for: the same design read as if two to four pairs knew sigma."""
    rng, looks, alpha = np.random.default_rng(12), (2, 3, 4), 0.01
    d = rng.standard_normal((50_000, 4))
    z = efficacy(tuple(map(float, looks)), alpha, "pocock")
    naive = np.zeros(len(d), dtype=bool)
    for k, n in enumerate(looks):
        naive |= d[:, :n].mean(axis=1) / (d[:, :n].std(axis=1, ddof=1) / math.sqrt(n)) > z[k]
    assert naive.mean() > 8 * alpha


@pytest.mark.parametrize("track", ["default", *(t for t in tracks() if not load_policy(t).for_tests_only)])
def test_shipped_policies_hold_alpha_over_their_spread_of_noise(track: str) -> None:
    policy = load_policy(track)
    for gain in (0.0, policy.materiality_bpb):
        r = rates(policy, gain, trials=50_000, seed=4)
        assert r.p_keep <= policy.alpha + 4 * r.mc_error


def test_power_grows_with_the_gain_and_a_loss_is_hardly_ever_kept() -> None:
    p = [rates(POLICY, g, trials=20_000, seed=5).p_keep for g in (-0.02, 0.0, 0.008, 0.016, 0.032)]
    assert p == sorted(p) and p[0] < 0.001 and p[-1] > 0.95


def test_futility_saves_runs_and_never_adds_keeps() -> None:
    never = dataclasses.replace(POLICY, futility_power=0.0)
    a, b = rates(POLICY, 0.0, trials=20_000, seed=6), rates(never, 0.0, trials=20_000, seed=6)
    assert a.runs < 0.7 * b.runs and a.p_keep <= b.p_keep


def test_a_shared_bank_correlates_errors_but_not_their_mean() -> None:
    policy = dataclasses.replace(POLICY, alpha=0.1, materiality_bpb=0.0, futility_power=0.0)
    shared = bank_spread(policy, banks=800, per_bank=25, shared=0.5, seed=7)
    alone = bank_spread(policy, banks=800, per_bank=25, shared=0.0, seed=7)
    assert shared["mean"] == pytest.approx(alone["mean"], abs=0.015)
    assert shared["p95"] > 1.5 * alone["p95"]


@pytest.mark.parametrize(("null", "gain", "share"), [
    (0.005, 0.9, 0.0476190), (0.0, 0.5, 0.0), (0.0, 0.0, 0.0), (0.1, 0.9, 0.5),
])
def test_false_share_is_bayes(null: float, gain: float, share: float) -> None:
    assert false_share(null, gain) == pytest.approx(share, abs=1e-6)


def test_same_seed_same_rates() -> None:
    assert rates(POLICY, 0.01, trials=2000, seed=3) == rates(POLICY, 0.01, trials=2000, seed=3)


def test_running_sums_give_every_trials_mean_and_squares() -> None:
    rng = np.random.default_rng(20)
    values, n = rng.standard_normal((50, 6)) + 3.0, rng.integers(1, 7, 50)
    mean, squares = Sums(values).each(n)
    for i in range(50):
        assert mean[i] == pytest.approx(values[i, : n[i]].mean())
        assert squares[i] == pytest.approx(((values[i, : n[i]] - values[i, : n[i]].mean()) ** 2).sum(), abs=1e-12)


def test_every_trial_may_start_from_its_own_pool() -> None:
    rng = np.random.default_rng(21)
    d = draw(FREE, 0.008, 200, rng)
    sigma, df = rng.uniform(0.002, 0.01, 200), rng.choice([1.0, 2.0, 3.0], 200)
    kept, used = sequential(FREE, "paired", sigma, df, 200, Sums(d))
    for i in range(200):
        one = sequential(FREE, "paired", float(sigma[i]), float(df[i]), 1, Sums(d[i : i + 1]))
        assert (kept[i], used[i]) == (one[0][0], one[1][0])


def test_the_simulated_veto_is_the_veto() -> None:
    rng = np.random.default_rng(22)
    policy = dataclasses.replace(POLICY, breadth_pairs=3, breadth_veto_sigmas=0.7)
    noise = dataclasses.replace(shipped(policy), sigma_d=0.006)
    d = 0.006 * rng.standard_normal((200, 3))
    passed = breadth_passes(policy, noise.sigma_d, min(policy.shrink_df, noise.df), d)
    assert 0.5 < passed.mean() < 0.95
    for i in range(200):
        assert (breadth_verdict(policy, *gains(list(d[i])), noise).decision == "promote") == passed[i]


def test_breadth_promotes_the_more_the_better_the_edit_and_never_vetoes_without_a_threshold() -> None:
    p = [reach(POLICY, g, trials=20_000, seed=23) for g in (-0.02, -0.004, 0.0, 0.004, 0.02)]
    assert p == sorted(p) and p[0] < 0.2 and p[-1] > 0.95
    assert reach(dataclasses.replace(POLICY, breadth_veto_sigmas=100.0), -0.01, trials=20_000) > 0.999
    blind = World(disagreement=50.0)
    assert abs(reach(POLICY, 0.02, world=blind, seed=1) - reach(POLICY, -0.02, world=blind, seed=1)) < 0.1


def test_tau_of_breadth_is_that_of_the_normal_law() -> None:
    """Kendall's tau of a bivariate normal pair is 2 / pi asin(rho)."""
    rng = np.random.default_rng(24)
    truth = rng.standard_normal((1, 4000))
    seen = truth + 0.8 * rng.standard_normal((1, 4000))
    want = 2.0 / math.pi * math.asin(1.0 / math.hypot(1.0, 0.8))
    assert breadth_tau(Proposals(gain=truth, breadth=seen, sigma=truth), sample=4000) == pytest.approx(want, abs=0.02)


def test_breadth_ranks_the_usual_mixes_as_a_measured_panel_did() -> None:
    for mix in (Mix(name="plain"), Mix(name="harsh", harm_share=0.5)):
        tau = breadth_tau(propose(POLICY, mix, Costs(), nights=50, seed=25), sample=4000)
        assert 0.58 < tau < 0.87  # the 90% interval of the panel on pocket


@pytest.mark.parametrize("mix", [
    Mix(name="plain"), Mix(name="harsh", harm_share=0.5), Mix(name="spread", spread=True, gain=3.0),
    Mix(name="wear", spread=True, harm_share=1.0, harm=0.25, true_share=0.2),
])
def test_a_mix_is_what_it_says(mix: Mix) -> None:
    p = propose(POLICY, mix, Costs(), nights=1000, seed=26)
    sigma, n = POLICY.prior.sigma_d, p.gain.size
    rest = 1.0 - mix.true_share
    assert (p.gain > 0).mean() == pytest.approx(mix.true_share, abs=5 / math.sqrt(n))
    assert (p.gain < 0).mean() == pytest.approx(rest * mix.harm_share, abs=5 / math.sqrt(n))
    assert p.gain[p.gain > 0].mean() == pytest.approx(mix.gain * sigma, rel=0.03)
    assert p.gain[p.gain < 0].mean() == pytest.approx(-mix.gain * mix.harm * sigma, rel=0.03)
    assert np.median(p.sigma) == pytest.approx(sigma, rel=0.02)
    assert f"{mix.true_share:.0%} true gains of {mix.gain:g} sigma" in mix.words


def test_design_puts_what_meets_the_targets_first_and_cheapest() -> None:
    choices = design(basis(POLICY), 0.012, grid=NARROW, trials=2000)
    good = [c for c in choices if c.meets]
    assert good and choices[: len(good)] == good
    assert [c.cost_per_keep for c in good] == sorted(c.cost_per_keep for c in good)
    assert all(c.false_share <= TARGETS.false_share and c.power >= TARGETS.power and c.power_runs <= TARGETS.runs
               for c in good)
    assert not any(c.meets for c in choices if c.alpha == 0.4)
    (today,) = [c for c in choices if c.today]
    assert (today.looks, today.alpha, today.spending) == (POLICY.looks, POLICY.alpha, POLICY.spending)


def test_design_can_fail_every_policy() -> None:
    assert not any(c.meets for c in design(basis(POLICY), 0.0021, grid=NARROW, trials=1000))


def test_what_a_policy_achieves_is_what_rates_say() -> None:
    got = achieved(basis(POLICY), 0.012, trials=50_000)
    want = rates(POLICY, 0.012, trials=50_000, seed=9, sigma=POLICY.prior.sigma_d)
    assert got.power == pytest.approx(want.p_keep, abs=5 * want.mc_error + 0.002)
    assert got.power_runs == pytest.approx(want.runs, abs=0.03)
    words = goals(got)
    assert [g.met for g in words] == [got.power >= 0.9, got.power_runs <= 6.0, got.false_share <= 0.05, True]
    assert [g.met for g in goals(got, Targets(power=1.01, runs=0.5, false_share=0.0, alpha_slack=0.0))] == [False] * 4


def test_two_sample_policies_are_designed_too() -> None:
    unpaired = dataclasses.replace(POLICY, prior=dataclasses.replace(POLICY.prior, sigma_d=0.0014, sigma_run=0.001))
    choices = design(basis(unpaired), 0.004, grid=NARROW, trials=1000)
    assert any(c.meets for c in choices) and target_gain(unpaired) == 0.002


def _verdicts(differences: list[list[float]]) -> list[Decided]:
    done: list[Decided] = []
    for d in differences:
        done.append(confirm_step(FREE, *gains(d), pool_decided(FREE, done), Facts(cap_bytes=CAP)))
    return done


def test_the_ledgers_own_noise_is_used_when_there_is_enough_of_it() -> None:
    rng = np.random.default_rng(27)
    sigma, effects = 0.0012, rng.normal(0.01, 0.02, 40)
    verdicts = _verdicts([list(e + sigma * rng.standard_normal(4)) for e in effects])
    own = basis(FREE, verdicts)
    assert own.source == "ledger" and own.trials == 40 and "40 confirm verdicts" in own.words
    # a log-normal of spread s has root mean square exp(s^2) times its median
    rms = own.policy.prior.sigma_d * math.exp(FREE.prior.spread**2)
    assert rms == pytest.approx(sigma, rel=0.15)
    assert own.noise == pool_decided(FREE, verdicts)
    assert np.corrcoef(own.effects, effects)[0, 1] > 0.99
    few = basis(FREE, verdicts[: ENOUGH_TRIALS - 1])
    assert few.source == "shipped" and few.policy == FREE and f"{ENOUGH_TRIALS - 1} of the {ENOUGH_TRIALS}" in few.words
    assert basis(FREE).words.startswith("the policy's shipped noise")
    kept = own_effects(own, trials=20_000)
    assert kept["p_keep_real"] > kept["p_keep"] > 0.3 and kept["false_share"] < 0.02


def test_effects_that_are_all_noise_are_shrunk_to_their_mean() -> None:
    rng = np.random.default_rng(28)
    own = basis(FREE, _verdicts([list(0.02 * rng.standard_normal(2)) for _ in range(12)]))
    assert np.ptp(own.effects) < 0.01


def test_a_calibration_is_the_ledgers_own_noise() -> None:
    rng = np.random.default_rng(29)
    values = [float(v) for v in 2.4 + 0.01 * rng.standard_normal(8)]
    edits = [{"change": {}, "differences": [float(v) for v in 0.002 * rng.standard_normal(8)], "sigma_d": 0.002}
             for _ in range(2)]
    body = msgspec.convert({
        "track": "tests", "fingerprint": "f", "fingerprint_parts": {}, "stage": "confirm", "config_hash": "",
        "commit": "", "seeds": list(range(8)), "values": values, "sigma_run": 0.01, "same_seed": [], "bitwise": True,
        "edits": edits, "sigma_d": 0.002, "correlation": 0.9, "correlation_low": 0.8, "correlation_high": 0.99,
        "step_ms_spread_pct": 1.0, "bytes_spread": 0, "seconds": 1.0}, CalibrationMeasured)
    own = basis(FREE, (), body)
    assert own.source == "ledger" and "calibration of 2 edits" in own.words and own.effects == ()
    assert own.policy.prior.sigma_d * math.exp(FREE.prior.spread**2) == pytest.approx(0.002, rel=0.5)
    assert own.noise.df == shipped(FREE).df + 14


def test_a_summary_is_made_of_its_rates() -> None:
    s = summary(POLICY, 0.012, trials=5000, seed=30)
    assert s.null == rates(POLICY, 0.0, trials=5000, seed=30)
    assert s.false_share == false_share(s.null.p_keep, s.target.p_keep)
    assert s.runs == pytest.approx(0.9 * s.null.runs + 0.1 * s.target.runs)
    assert [p.gain for p in s.powers] == [m * POLICY.prior.sigma_d for m in (1, 2, 3)]
