"""Whole nights: every rule against a plain reference that makes one trial after the other, and what they claim."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np
import pytest

from harness.gate.noise import pool_decided, shipped
from harness.gate.policy import Policy
from harness.gate.rivals import (
    LIKELY_REAL,
    STEPS,
    Luck,
    Nights,
    Rule,
    Sizes,
    figures,
    gate_nights,
    play,
    rival_nights,
    rules,
)
from harness.gate.simulate import Costs, Floats, Mix, Proposals, World, propose
from harness.gate.verdict import Facts, breadth_verdict, confirm_step
from ledger.records import Decided
from tests.harness.gate_figures import CAP, POLICY, gains, sides

HONEST = dataclasses.replace(
    POLICY, price_mb=0.0, price_time=0.0, honest_pairs=3, honest_extend=2, timing_pairs=2, breadth_veto_sigmas=0.5,
    alpha=0.1, spending="pocock", looks=(2, 4, 6), min_correlation=-1.0, shrink_df=5.0)
NIGHT = Costs(budget=80.0, workers=2)
SIGMA = POLICY.prior.sigma_d
LOWER = Rule(name="lower", kind="lower")


def reference_play(rule: Rule, gain: list[float], luck: list[float]) -> tuple[list[bool], list[float]]:
    """One night of a one-run rule, as its own text tells it."""
    truth, results, best, kept, claimed = 0.0, [luck[0]], luck[0], [], []
    for g, bad in zip(gain, luck[1:], strict=True):
        score = truth - g + bad
        results.append(score)
        keep = score < best - (rule.threshold if rule.kind == "threshold" else 0.0)
        if rule.kind == "best-mad" and keep:
            middle = statistics.median(results)
            mad = statistics.median(abs(r - middle) for r in results)
            keep = len(results) >= 3 and mad > 0.0 and abs(score - results[0]) / mad >= LIKELY_REAL
        kept.append(keep)
        claimed.append(best - score if keep else 0.0)
        if keep:
            truth, best = truth - g, score
    return kept, claimed


@pytest.mark.parametrize("rule", rules(0.008), ids=lambda r: r.name)
def test_rivals_do_what_their_text_says(rule: Rule) -> None:
    rng = np.random.default_rng(1)
    gain = rng.choice([0.008, 0.0, -0.008], (40, 30), p=[0.3, 0.4, 0.3])
    luck = 0.006 * rng.standard_normal((40, 31))
    kept, claimed = play(rule, gain, luck)
    assert 0.01 < kept.mean() < 0.7
    for i in range(40):
        want, said = reference_play(rule, list(gain[i]), list(luck[i]))
        assert list(kept[i]) == want
        assert list(claimed[i]) == pytest.approx(said)


def test_identical_results_give_no_confidence() -> None:
    """MAD 0: pi-autoresearch has no confidence then. A first gain among equal scores is not called real."""
    gain = np.array([[0.0, 0.0, 0.0, 0.01]])
    assert not play(Rule(name="", kind="best-mad"), gain, np.zeros((1, 5)))[0].any()
    assert play(LOWER, gain, np.zeros((1, 5)))[0].tolist() == [[False, False, False, True]]


def test_keep_if_lower_follows_the_harmonic_law_of_records() -> None:
    """On exchangeable noise the n-th run beats all before it with chance 1/n."""
    luck = np.random.default_rng(2).standard_normal((4000, 21))
    kept, _ = play(LOWER, np.zeros((4000, 20)), luck)
    assert kept.sum(axis=1).mean() == pytest.approx(sum(1 / n for n in range(2, 22)), rel=0.03)


def reference_night(
    policy: Policy, proposals: Proposals, costs: Costs, world: World, lucks: list[Luck], n: int,
) -> dict[str, float]:
    """One night of the gate, trial by trial, with the verdicts of the gate itself (paired form)."""
    shared, rest = math.sqrt(world.shared), math.sqrt(1.0 - world.shared)
    t = {"runs": float(policy.controls), "trials": 0, "reached": 0, "keeps": 0, "false": 0, "reverted": 0,
         "confirm_runs": 0, "gain": 0.0, "claim": 0.0, "honest": 0.0}
    bank, breadth_bank, made, breadth_known = lucks[0].bank[n], lucks[0].breadth_bank[n], policy.controls, False
    pool: list[Decided] = []
    for i, luck in enumerate(lucks[1:]):
        if t["runs"] >= costs.budget:
            break
        gain, sigma = float(proposals.gain[n, i]), float(proposals.sigma[n, i])
        t["trials"] += 1
        t["runs"] += 2 * costs.short + policy.breadth_pairs * costs.breadth * (1 if breadth_known else 2)
        breadth_known = True
        noise = pool_decided(policy, pool)
        short = [float(proposals.breadth[n, i] + world.breadth_sigma * sigma * (shared * a + rest * b))
                 for a, b in zip(breadth_bank, luck.breadth[n], strict=True)]
        if breadth_verdict(policy, *gains(short), noise).decision == "veto":
            continue
        t["reached"] += gain > 0.0
        diffs = [gain + sigma * (shared * a + rest * b) for a, b in zip(bank, luck.confirm[n], strict=False)]
        have = policy.looks[0]
        while True:
            have = min(-(-have // costs.workers) * costs.workers, policy.max_pairs)
            decided = confirm_step(policy, *sides([2.4] * have, [2.4 - d for d in diffs[:have]]), noise,
                                   Facts(cap_bytes=CAP, timing=[(1.0, 1.0)] * policy.timing_pairs))
            if decided.verdict != "continue":
                break
            have = decided.needed_pairs
        t["confirm_runs"] += have
        t["runs"] += have + max(0, max(have, policy.controls) - made)
        made = max(made, have)
        pool.append(decided)
        if decided.verdict != "keep":
            continue
        t["keeps"] += 1
        t["false"] += gain <= 0.0
        t["runs"] += 2 * policy.timing_pairs * costs.short
        bank, breadth_bank, breadth_known = luck.bank[n], luck.breadth_bank[n], False
        fresh = [gain + sigma * (shared * a - rest * b) for a, b in zip(luck.parent[n], luck.bank[n], strict=True)]
        pairs = policy.honest_pairs
        if sum(fresh[:pairs]) < 0.0:
            pairs += policy.honest_extend
        mean = statistics.fmean(fresh[:pairs])
        made = max(policy.controls, pairs)
        t["runs"] += made + pairs
        if mean < 0.0:
            t["reverted"] += 1
            bank = luck.parent[n]
            t["runs"] += max(0, policy.controls - pairs)
            continue
        t["gain"] += gain
        t["claim"] += -(decided.delta_bpb or 0.0)
        t["honest"] += mean
    return t


def drawn(policy: Policy, proposals: Proposals, seed: int) -> list[Luck]:
    """The luck of ``gate_nights``, in its order: the first incumbent's, then each proposal's."""
    rng, sizes = np.random.default_rng([seed, 3]), Sizes.of(policy)
    return [sizes.draw(rng, len(proposals.gain)) for _ in range(1 + proposals.gain.shape[1])]


@pytest.mark.parametrize("policy", [
    dataclasses.replace(HONEST, alpha=0.4, materiality_bpb=0.0),
    dataclasses.replace(HONEST, looks=(3, 4), controls=2, honest_extend=0, alpha=0.3, futility_power=0.2),
], ids=["extends", "reverts at once"])
def test_a_simulated_night_is_the_gates_own_verdicts_one_after_the_other(policy: Policy) -> None:
    mix = Mix(name="", gain=2.0, true_share=0.3, harm_share=0.3)
    proposals = propose(policy, mix, NIGHT, nights=25, seed=4)
    out = gate_nights(policy, proposals, NIGHT, seed=4)
    lucks = drawn(policy, proposals, 4)
    totals = [reference_night(policy, proposals, NIGHT, World(), lucks, n) for n in range(25)]
    for name in totals[0]:
        assert list(out.totals[name]) == pytest.approx([t[name] for t in totals]), name
    assert out.totals["keeps"].sum() > 20 and out.totals["reverted"].sum() > 2, "the night must exercise both"


def test_two_sample_nights_keep_gains_and_little_else() -> None:
    prior = dataclasses.replace(POLICY.prior, sigma_d=0.0017, sigma_run=0.0012)
    policy = dataclasses.replace(HONEST, prior=prior, min_correlation=0.3, looks=(2, 4, 6), alpha=0.01,
                                 materiality_bpb=0.0005)
    costs = Costs(budget=120.0)
    proposals = propose(policy, Mix(name="", gain=4.0), costs, nights=400, seed=5)
    f = figures(gate_nights(policy, proposals, costs, seed=5), 0.0012, costs)
    assert f["p_keep_reached"].value > 0.9 and f["false_share"].value < 0.05
    assert abs(f["overclaim_honest_per_keep"].value) < 0.1 + 3 * f["overclaim_honest_per_keep"].error


def test_what_the_rules_claim_and_keep() -> None:
    """The field's loop keeps mostly noise and claims what is not there; fresh pairs claim about what is."""
    policy = dataclasses.replace(POLICY, honest_pairs=4, honest_extend=4, looks=(2, 4, 6, 8), alpha=0.02)
    costs = Costs()
    proposals = propose(policy, Mix(name="", gain=2.0), costs, nights=1500, seed=6)
    shown = {r.name: figures(rival_nights(policy, proposals, costs, r, seed=6), SIGMA, costs)
             for r in rules(2.0 * SIGMA)}
    gate = figures(gate_nights(policy, proposals, costs, seed=6), SIGMA, costs)
    for name, f in shown.items():
        assert f["false_share"].value > 0.26, name
        assert f["overclaim"].value > 1.0 + 3 * f["overclaim"].error, name
        assert "overclaim_honest" not in f
    assert gate["false_share"].value < 0.08
    assert abs(gate["overclaim_honest"].value) < 0.15 + 3 * gate["overclaim_honest"].error
    assert gate["overclaim"].value > gate["overclaim_honest"].value, "a selected figure flatters"
    assert gate["standing_false_share"].value <= gate["false_share"].value


def test_without_fresh_pairs_the_honest_claim_is_from_fresh_controls() -> None:
    policy = dataclasses.replace(HONEST, honest_pairs=0, honest_extend=0)
    proposals = propose(policy, Mix(name="", gain=3.0), NIGHT, nights=600, seed=7)
    out = gate_nights(policy, proposals, NIGHT, seed=7)
    assert not out.totals["reverted"].any()
    error = (out.totals["honest"] - out.totals["gain"])[out.totals["keeps"] > 0]
    want = policy.prior.sigma_run * math.sqrt(2.0 / policy.controls)
    assert error.std() == pytest.approx(want, rel=0.1) and abs(error.mean()) < 4 * want / math.sqrt(len(error))


def test_every_rule_spends_the_same_time() -> None:
    proposals = propose(HONEST, Mix(name=""), NIGHT, nights=300, seed=8)
    for rule in rules(0.008):
        assert (rival_nights(HONEST, proposals, NIGHT, rule, seed=8).totals["runs"] == NIGHT.budget).all()
    spent = gate_nights(HONEST, proposals, NIGHT, seed=8).totals["runs"]
    # a trial that has begun is finished: at most breadth on both sides, all pairs and controls, and a keep's aftermath
    pairs = HONEST.honest_pairs + HONEST.honest_extend
    longest = 4 * HONEST.breadth_pairs + 2 * HONEST.max_pairs + HONEST.controls + 2 * pairs
    assert (spent >= NIGHT.budget).all() and (spent <= NIGHT.budget + longest).all()


def test_dearer_breadth_means_fewer_trials() -> None:
    def trials(breadth: float) -> float:
        costs = Costs(breadth=breadth)
        return figures(gate_nights(HONEST, propose(HONEST, Mix(name=""), costs, nights=200), costs), SIGMA,
                       costs)["trials"].value

    assert trials(0.1) > 1.3 * trials(0.6) > 1.3 * 1.3 * trials(2.0)


def test_nights_are_repeatable_and_rules_share_their_proposals_luck() -> None:
    proposals = propose(HONEST, Mix(name=""), NIGHT, nights=50, seed=9)
    again = propose(HONEST, Mix(name=""), NIGHT, nights=50, seed=9)
    assert (proposals.gain == again.gain).all() and (proposals.breadth == again.breadth).all()
    a, b = (gate_nights(HONEST, p, NIGHT, seed=9).totals for p in (proposals, again))
    assert all((a[k] == b[k]).all() for k in a)
    strict, loose = (rival_nights(HONEST, proposals, NIGHT, Rule(name="", kind="threshold", threshold=x), seed=9)
                     for x in (0.0, 0.0))
    lower = rival_nights(HONEST, proposals, NIGHT, LOWER, seed=9)
    assert (strict.totals["keeps"] == loose.totals["keeps"]).all()
    assert (strict.totals["keeps"] == lower.totals["keeps"]).all(), "a threshold of nothing is keep if lower"


def test_progress_adds_up_to_what_was_gained() -> None:
    proposals = propose(HONEST, Mix(name="", gain=3.0), NIGHT, nights=100, seed=10)
    n = rival_nights(HONEST, proposals, NIGHT, LOWER, seed=10)
    assert n.progress.shape == (STEPS, 2)
    # the run that ends with the budget stands at its very end, past the last slice
    last = n.totals["gain"].mean() - n.progress[:, 0].sum()
    assert abs(last) < 0.1 * abs(n.totals["gain"].mean())
    gate = gate_nights(HONEST, proposals, NIGHT, seed=10)
    assert gate.progress[:, 0].sum() <= gate.totals["gain"].mean() + 1e-12


def test_errors_of_ratios_are_those_of_repeated_simulations() -> None:
    rng = np.random.default_rng(11)

    def one() -> tuple[float, float]:
        n = Nights("x", 200)
        n.totals["runs"] += NIGHT.budget
        n.totals["keeps"] += rng.poisson(3.0, 200)
        n.totals["false"] += rng.binomial(n.totals["keeps"].astype(int), 0.3)
        f = figures(n, SIGMA, NIGHT)["false_share"]
        return f.value, f.error

    values: Floats = np.array([one() for _ in range(400)])
    assert values[:, 0].mean() == pytest.approx(0.3, abs=0.005)
    assert values[:, 0].std() == pytest.approx(values[:, 1].mean(), rel=0.15)


def test_nothing_kept_divides_by_nothing() -> None:
    f = figures(Nights("x", 5), SIGMA, NIGHT)
    assert all(v.value == 0.0 and v.error == 0.0 for v in f.values())


def test_a_bigger_pool_is_learnt_from() -> None:
    """A night of noisy edits ends with a wider pool than the shipped scale: fewer keeps than with a fixed one."""
    loud = dataclasses.replace(HONEST, prior=dataclasses.replace(HONEST.prior, spread=0.0), honest_pairs=0)
    proposals = propose(loud, Mix(name="", gain=1.0, true_share=1.0), Costs(budget=200.0), nights=200, seed=12)
    noisy = dataclasses.replace(proposals, sigma=np.full_like(proposals.sigma, 3.0 * SIGMA))
    learns = gate_nights(loud, noisy, Costs(budget=200.0), seed=12).totals
    fixed = gate_nights(dataclasses.replace(loud, pool_clip=1.0), noisy, Costs(budget=200.0), seed=12).totals
    assert shipped(loud).sigma_d < 3.0 * SIGMA
    assert learns["keeps"].sum() / learns["trials"].sum() < fixed["keeps"].sum() / fixed["trials"].sum()
