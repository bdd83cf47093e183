"""Error rates: simulation against the verdict itself, against alpha, and against the field's usual loop."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from harness.gate.boundaries import efficacy
from harness.gate.design import design
from harness.gate.greedy import greedy
from harness.gate.noise import Noise, shipped
from harness.gate.policy import Policy, load_policy
from harness.gate.simulate import bank_spread, draw, false_share, judge, judge_two_sample, rates, summary
from harness.gate.verdict import Facts, confirm_step
from tests.harness.gate_figures import CAP, POLICY, sides

FREE = dataclasses.replace(POLICY, price_mb=0.0, price_time=0.0)
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


@pytest.mark.parametrize("track", ["pocket", "gpu-proxy", "h100-1x", "record-8x", "default"])
def test_shipped_policies_hold_alpha_over_their_spread_of_noise(track: str) -> None:
    policy = load_policy(track)
    for gain in (0.0, policy.materiality_bpb):
        r = rates(policy, gain, trials=50_000, seed=4)
        assert r.p_keep <= policy.alpha + 4 * r.mc_error


def test_pocket_meets_its_goals() -> None:
    """False keeps under 5% of keeps at 1 true gain in 10; P(keep) >= 90% at 0.02 for typical noise."""
    pocket = load_policy("pocket")
    null = rates(pocket, 0.0, trials=50_000, seed=1)
    for gain in (0.01, 0.02):
        assert false_share(null.p_keep, rates(pocket, gain, trials=20_000, seed=2).p_keep) < 0.05
    assert rates(pocket, 0.02, trials=20_000, seed=3, sigma=0.004).p_keep >= 0.9
    assert rates(pocket, 0.0365, trials=20_000, seed=4, sigma=0.0008).p_keep >= 0.99


def test_gpu_proxy_meets_the_targets_of_the_design() -> None:
    """P(keep) >= 90% at 2 sigma for at most 6 runs; false keeps under 5% of keeps."""
    s = summary(load_policy("gpu-proxy"), 0.004, trials=30_000, sigma=None)
    two = s.powers[1]
    assert two.p_keep >= 0.9 and two.runs <= 6.0
    assert false_share(s.null.p_keep, two.p_keep) <= 0.05


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


def test_pure_noise_proposals_greedy_against_the_gate() -> None:
    """The field's defect: on proposals that change nothing, the loop that keeps what looks better, keeps."""
    pocket = load_policy("pocket")
    loop = greedy(pocket, 0.0, true_share=0.0, proposals=40, nights=1000, seed=8)
    assert loop.keeps > 2.5 and loop.false_share == 1.0
    assert loop.true == 0.0 and loop.claimed > 1.5 * pocket.prior.sigma_run, "a gain that does not exist"
    night = bank_spread(pocket, banks=1000, per_bank=40, seed=8)
    assert 40 * night["mean"] < 0.2, "expected false keeps a night"


def test_greedy_keeps_are_mostly_false_and_overclaim_at_one_true_gain_in_ten() -> None:
    pocket: Policy = load_policy("pocket")
    loop = greedy(pocket, 0.01, seed=9)
    ours = false_share(rates(pocket, 0.0, trials=50_000).p_keep, rates(pocket, 0.01, trials=20_000).p_keep)
    assert loop.false_share > 0.26 > 5 * ours
    assert loop.claimed > loop.true


def test_greedy_record_scores_follow_the_harmonic_law() -> None:
    """On exchangeable noise the n-th run beats all before it with chance 1/n: keeps = sum of 1/n, n = 2..N+1."""
    loop = greedy(POLICY, 0.0, true_share=0.0, proposals=20, nights=4000, seed=10)
    # a tenth of the proposals lose `gain` = 0 here, so all are exchangeable
    assert loop.keeps == pytest.approx(sum(1 / n for n in range(2, 22)), rel=0.03)


def test_design_puts_what_meets_the_targets_first_and_cheapest() -> None:
    choices = design(POLICY, 0.02, alphas=(0.01, 0.4), trials=4000)
    good = [c for c in choices if c.meets]
    assert good and choices[: len(good)] == good
    assert [c.runs for c in good] == sorted(c.runs for c in good)
    assert all(c.false_share <= 0.05 and c.power >= 0.9 for c in good)
    assert not any(c.meets for c in choices if c.alpha == 0.4)


@pytest.mark.parametrize(("null", "gain", "share"), [
    (0.005, 0.9, 0.0476190), (0.0, 0.5, 0.0), (0.0, 0.0, 0.0), (0.1, 0.9, 0.5),
])
def test_false_share_is_bayes(null: float, gain: float, share: float) -> None:
    assert false_share(null, gain) == pytest.approx(share, abs=1e-6)


def test_same_seed_same_rates() -> None:
    assert rates(POLICY, 0.01, trials=2000, seed=3) == rates(POLICY, 0.01, trials=2000, seed=3)
