"""Verdicts: what must always hold, whatever the figures."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness.gate.boundaries import efficacy
from harness.gate.checks import GateError
from harness.gate.explain import REASONS, explain
from harness.gate.noise import Noise, shipped
from harness.gate.policy import Policy
from harness.gate.verdict import Facts, breadth_verdict, confirm_step, recompute
from ledger.records import Decided, RunFigures
from tests.harness.gate_figures import CAP, POLICY, gains, run, sides

NOISE = shipped(POLICY)
UNPAIRED = Noise(sigma_d=0.02, df=20.0, sigma_run=0.01, run_df=20.0)  # rho -1: two-sample
FREE = dataclasses.replace(POLICY, price_mb=0.0, price_time=0.0)

difference = st.floats(-0.05, 0.05)
differences = st.lists(difference, min_size=4, max_size=4)


def judge(
    policy: Policy, both: tuple[list[RunFigures], list[RunFigures]], cap: int = CAP, noise: Noise = NOISE,
) -> Decided:
    return confirm_step(policy, *both, noise, Facts(cap_bytes=cap))


@given(differences, st.permutations(range(4)), st.permutations(range(4)))
@settings(deadline=None)
def test_the_order_of_runs_does_not_matter(d: list[float], p: list[int], q: list[int]) -> None:
    control, candidate = gains(d)
    assert judge(POLICY, ([control[i] for i in p], [candidate[i] for i in q])) == judge(POLICY, (control, candidate))


@given(differences, st.floats(-1.0, 1.0))
@settings(deadline=None)
def test_a_constant_added_to_both_sides_changes_nothing(d: list[float], shift: float) -> None:
    a, b = judge(POLICY, gains(d)), judge(POLICY, gains(d, base=2.3 + shift))
    for x, y in zip(a.looks, b.looks, strict=False):
        assert (x.mean, x.se, x.lower) == pytest.approx((y.mean, y.se, y.lower), abs=1e-12)
    margin = min(abs(x.lower - POLICY.materiality_bpb) for x in a.looks)
    near = margin < 1e-9 or any(abs(x.mean - x.futility) < 1e-9 for x in a.looks)
    assert near or (a.verdict, len(a.looks)) == (b.verdict, len(b.looks))


@given(st.lists(st.floats(0.045, 0.06), min_size=4, max_size=4))
@settings(deadline=None)
def test_better_by_a_lot_on_every_seed_is_kept(d: list[float]) -> None:
    assert judge(POLICY, gains(d)).reason == "kept.gain"


def test_the_best_known_step_is_kept_within_the_pairs_of_pocket() -> None:
    """Muon momentum 0.95 -> 0.90 on pocket: 0.0365 on every seed, give or take 0.0008."""
    assert judge(POLICY, gains([0.0365, 0.0373, 0.0357, 0.0365])).verdict == "keep"


@pytest.mark.parametrize("policy", [POLICY, FREE])
@pytest.mark.parametrize("noise", [NOISE, UNPAIRED])
def test_identical_is_never_kept(policy: Policy, noise: Noise) -> None:
    both = sides([2.3, 2.31, 2.29, 2.3], [2.3, 2.31, 2.29, 2.3])
    assert judge(policy, both, noise=noise).verdict == "reject"


def test_a_change_without_any_effect_is_called_immaterial() -> None:
    control = [run(k, 2.3, "c", artifact_sha256="same") for k in range(4)]
    candidate = [run(k, 2.3, "x", artifact_sha256="same") for k in range(4)]
    assert judge(POLICY, (control, candidate)).reason == "rejected.immaterial"


@given(st.lists(st.floats(-0.05, 0.0), min_size=4, max_size=4), st.sampled_from([NOISE, UNPAIRED]))
@settings(deadline=None)
def test_worse_is_never_kept(d: list[float], noise: Noise) -> None:
    assert judge(POLICY, gains(d), noise=noise).verdict == "reject"


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4), st.integers(0, 3))
@settings(deadline=None)
def test_over_the_cap_is_never_kept_whatever_the_gain(d: list[float], fat: int) -> None:
    control, candidate = gains(d)
    i = fat % len(candidate)
    candidate[i] = msgspec.structs.replace(candidate[i], artifact_bytes=CAP - 20_000 + 1)
    decided = judge(POLICY, (control, candidate))
    assert (decided.verdict, decided.reason) == ("reject", "rejected.bytes")
    assert recompute(decided) == []


def test_the_margin_counts_and_the_cap_is_16_million_not_16_mib() -> None:
    """The margin is 0.1% of the worst seed: at 16,000,000 bytes the last size that fits is 15,984,015."""
    cap = 16_000_000
    policy = dataclasses.replace(POLICY, byte_margin_fraction=0.001, price_mb=0.0)
    for total, fits in ((15_984_015, True), (15_984_016, False), (16_000_000, False), (16_777_000, False)):
        both = gains([0.05] * 4, artifact_bytes=total - 20_000)
        assert (judge(policy, both, cap=cap).reason != "rejected.bytes") == fits


def test_a_slow_candidate_is_refused_by_the_median() -> None:
    control, candidate = gains([0.05] * 4)
    slow = [msgspec.structs.replace(r, step_ms=80.0 * 1.6) for r in candidate]
    assert judge(POLICY, (control, slow)).reason == "rejected.runtime"
    one_hiccup = [slow[0], *candidate[1:]]
    assert judge(POLICY, (control, one_hiccup)).verdict == "keep"


@pytest.mark.parametrize("noise", [NOISE, UNPAIRED])
@pytest.mark.parametrize("d", [
    [0.03, 0.031, 0.029, 0.03], [0.004, -0.001, 0.006, 0.0], [-0.01] * 4, [0.2, 0.1, 0.0, 0.1],
])
def test_looks_against_textbook_formulas(d: list[float], noise: Noise) -> None:
    """Every look recomputed with numpy and scipy.stats alone."""
    both = gains(d)
    decided = judge(FREE, both, noise=noise)
    c, x = (np.array([r.val_bpb for r in side]) for side in both)
    paired = noise is NOISE
    info = [float(n) if paired else 4.0 * n / (4.0 + n) for n in FREE.looks]
    z = efficacy(tuple(info), FREE.alpha, FREE.spending)
    for k, look in enumerate(decided.looks):
        n = look.n
        if paired:
            e = c[:n] - x[:n]
            df = FREE.shrink_df + n - 1
            var = (FREE.shrink_df * noise.sigma_d**2 + ((e - e.mean()) ** 2).sum()) / df
            se, mean = math.sqrt(var / n), e.mean()
        else:
            df = FREE.shrink_df + 4 + n - 2
            squares = c.var() * 4 + x[:n].var() * n
            var = (FREE.shrink_df * noise.sigma_run**2 + squares) / df
            se, mean = math.sqrt(var * (1 / n + 1 / 4)), c.mean() - x[:n].mean()
        boundary = stats.t.isf(stats.norm.sf(z[k]), df)
        assert (look.mean, look.se, look.df) == pytest.approx((mean, se, df))
        assert look.boundary == pytest.approx(boundary, rel=1e-6)
        assert look.lower == pytest.approx(mean - boundary * se, abs=1e-9)
        assert (look.decision == "keep") == (look.lower > FREE.materiality_bpb)
    assert decided.delta_bpb == pytest.approx(-decided.looks[-1].mean)


def test_utility_charges_bytes_and_time_once() -> None:
    control, candidate = gains([0.03] * 4, artifact_bytes=700_000, step_ms=80.0 * 1.25)
    look = judge(POLICY, (control, candidate)).looks[-1]
    assert look.mean == pytest.approx(0.03 - 0.05 * 0.1 - 0.001 * (25.0 - 10.0))
    fast = judge(POLICY, gains([0.03] * 4, step_ms=40.0)).looks[-1]
    assert fast.mean == pytest.approx(0.03), "speed earns no bpb"


def test_fewer_bytes_are_kept_only_when_the_score_holds() -> None:
    policy = dataclasses.replace(POLICY, price_mb=0.5, noninferiority_bpb=0.01)
    smaller = judge(policy, gains([0.0, 0.0005, -0.0005, 0.0], artifact_bytes=480_000))
    assert smaller.reason == "kept.cheaper"
    lossy = judge(policy, gains([-0.03, -0.031, -0.029, -0.03], artifact_bytes=400_000))
    assert lossy.reason == "rejected.worse" and lossy.looks[-1].mean > 0.05
    assert recompute(smaller) == [] and recompute(lossy) == []


@pytest.mark.parametrize(("d", "reason"), [
    ([-0.02, -0.021, -0.019, -0.02], "rejected.worse"),
    ([0.01, -0.012, 0.02, -0.015], "rejected.noise"),
    ([0.03, 0.03, 0.03, 0.03], "kept.gain"),
])
def test_reasons(d: list[float], reason: str) -> None:
    assert judge(POLICY, gains(d)).reason == reason


def test_a_real_but_tiny_gain_is_immaterial() -> None:
    sharp = Noise(sigma_d=0.0001, df=50.0, sigma_run=0.01, run_df=50.0)
    assert judge(POLICY, gains([0.001] * 4), noise=sharp).reason == "rejected.immaterial"


def test_continue_says_how_many_pairs_the_next_look_wants() -> None:
    control, candidate = gains([0.008, 0.012, 0.01, 0.01])
    wanted = []
    for n in range(1, 5):
        step = judge(POLICY, (control, candidate[:n]))
        wanted.append((step.verdict, step.needed_pairs))
    assert wanted[:3] == [("continue", 2), ("continue", 3), ("continue", 4)]
    assert wanted[3][0] in ("keep", "reject")
    assert recompute(judge(POLICY, (control, candidate[:2]))) != [], "an unfinished step is no verdict"


def test_a_gap_in_the_seed_list_ends_the_pairs() -> None:
    """Run k = 1 is still out: what finished early must not choose the figures."""
    control, candidate = gains([0.05] * 4)
    step = judge(POLICY, (control, [candidate[0], candidate[2], candidate[3]]))
    assert (step.verdict, step.needed_pairs) == ("continue", 2)
    assert judge(POLICY, ([control[0], control[2]], candidate)).verdict == "continue"


@given(differences)
@settings(deadline=None)
def test_more_runs_never_change_an_earlier_look(d: list[float]) -> None:
    control, candidate = gains(d)
    final = judge(POLICY, (control, candidate))
    for n in (2, 3):
        step = judge(POLICY, (control, candidate[:n]))
        k = len(step.looks)
        assert step.looks == final.looks[:k]
        assert step.verdict == "continue" or step.verdict == final.verdict


@pytest.mark.parametrize(("change", "word"), [
    ({"evaluator_hash": "other"}, "evaluator_hash"), ({"data_fingerprint": "other"}, "data_fingerprint"),
    ({"split": "dev"}, "split"), ({"eval_tokens": 1}, "eval_tokens"), ({"eval_bytes": 1}, "eval_bytes"),
    ({"seed": 7}, "seed"), ({"tree_hash": "other"}, "tree"), ({"val_bpb": math.nan}, "val_bpb"),
    ({"val_bpb": math.inf}, "val_bpb"), ({"val_bpb": -1.0}, "val_bpb"),
    ({"final_train_loss": math.nan}, "final_train_loss"),
    ({"step_ms": 0.0}, "step_ms"), ({"artifact_bytes": 0}, "artifact_bytes"), ({"k": 0}, "k"),
    ({"run_id": "x0"}, "run_id"),
])
def test_what_must_not_be_compared_raises(change: dict[str, Any], word: str) -> None:
    control, candidate = gains([0.05] * 4)
    candidate[1] = msgspec.structs.replace(candidate[1], **change)
    with pytest.raises(GateError, match=word):
        judge(POLICY, (control, candidate))
    with pytest.raises(GateError, match=word):
        breadth_verdict(POLICY, control, candidate, NOISE)


def test_empty_sides_and_a_missing_cap_are_refused() -> None:
    control, candidate = gains([0.05] * 4)
    for both in ((control, []), ([], candidate)):
        with pytest.raises(GateError):
            judge(POLICY, both)
    with pytest.raises(GateError, match="cap"):
        judge(POLICY, (control, candidate), cap=0)


def test_two_sample_wants_the_whole_bank() -> None:
    control, candidate = gains([0.05] * 4)
    with pytest.raises(GateError, match="control bank"):
        judge(POLICY, (control[:2], candidate[:2]), noise=UNPAIRED)
    assert judge(POLICY, (control, candidate[:1]), noise=UNPAIRED).verdict == "continue"


# --- breadth ---------------------------------------------------------------------------------------------


@given(st.lists(difference, min_size=2, max_size=2))
@settings(deadline=None)
def test_breadth_only_vetoes_what_is_worse_by_more_than_its_error(d: list[float]) -> None:
    verdict = breadth_verdict(POLICY, *gains(d), NOISE)
    e = np.array(d)
    var = (2.0 * NOISE.sigma_d**2 + ((e - e.mean()) ** 2).sum()) / 3.0
    line = -1.0 * math.sqrt(var / 2)
    if abs(e.mean() - line) > 1e-9:
        assert (verdict.decision == "veto") == (e.mean() < line)
    assert verdict.threshold == pytest.approx(line)
    if verdict.decided:
        assert (verdict.decided.reason, verdict.decided.stage) == ("rejected.worse", "breadth")
        assert recompute(verdict.decided) == []


def test_breadth_waits_for_its_pairs() -> None:
    verdict = breadth_verdict(POLICY, *gains([-0.5]), NOISE)
    assert (verdict.decision, verdict.needed_pairs, verdict.decided) == ("continue", 2, None)


# --- the record ------------------------------------------------------------------------------------------


def roundtrip(decided: Decided) -> Decided:
    """As the ledger would hand it back."""
    return msgspec.json.decode(msgspec.json.encode(decided), type=Decided)


@given(differences, st.sampled_from([NOISE, UNPAIRED]))
@settings(deadline=None)
def test_every_verdict_reproduces_from_its_record(d: list[float], noise: Noise) -> None:
    decided = roundtrip(judge(POLICY, gains(d), noise=noise))
    assert recompute(decided) == []
    assert len(msgspec.json.encode(decided)) < 32_000
    text = explain(decided)
    assert decided.reason in text and f"{decided.delta_bpb:+.5f}" in text
    for r in (*decided.control, *decided.candidate):
        assert f"{r.val_bpb:.5f}" in text
    for look in decided.looks:
        assert f"{look.lower:+.5f}" in text and f"{look.boundary:.3f}" in text


def tampered() -> list[tuple[str, Decided]]:
    base = roundtrip(judge(POLICY, gains([0.03, 0.025, 0.032, 0.03])))
    replace = msgspec.structs.replace
    out = [
        ("verdict", replace(base, verdict="reject")), ("reason", replace(base, reason="kept.cheaper")),
        ("delta", replace(base, delta_bpb=-0.5)), ("bytes", replace(base, delta_bytes=-5)),
        ("time", replace(base, delta_step_pct=-50.0)), ("sigma", replace(base, sigma=0.001)),
        ("df", replace(base, sigma_df=50.0)), ("cap", replace(base, cap_bytes=600_000)),
        ("no looks", replace(base, looks=[])), ("no checks", replace(base, checks=[])),
        ("policy", replace(base, policy={**base.policy, "alpha": 0.4})),
        ("policy hash", replace(base, policy_hash="0" * 64)), ("stage", replace(base, stage="dreams")),
        ("prior", replace(base, noise_prior={**base.noise_prior, "sigma_d": 1e-4})),
        ("no prior", replace(base, noise_prior={})), ("one run less", replace(base, candidate=base.candidate[:1])),
    ]
    for side in ("control", "candidate"):
        runs = getattr(base, side)
        for change in ({"val_bpb": runs[0].val_bpb - 0.01}, {"artifact_bytes": 1}, {"step_ms": 1.0},
                       {"seed": 5}, {"evaluator_hash": "other"}):
            edited = [replace(runs[0], **change), *runs[1:]]
            if change == {"step_ms": 1.0}:  # a median shrugs off one run
                edited = [replace(r, step_ms=1.0) for r in runs]
            out.append((f"{side} {next(iter(change))}", replace(base, **{side: edited})))
    for name in ("n", "mean", "se", "sigma", "df", "boundary", "futility", "lower"):
        last = replace(base.looks[-1], **{name: getattr(base.looks[-1], name) + 1})
        out.append((f"look {name}", replace(base, looks=[*base.looks[:-1], last])))
    return out


@pytest.mark.parametrize(("what", "decided"), tampered(), ids=lambda x: x if isinstance(x, str) else "")
def test_tampering_is_reported(what: str, decided: Decided) -> None:
    assert recompute(decided) != [], what


def test_preflight_records_reproduce_unless_they_keep() -> None:
    policy = POLICY.to_dict()
    refused = Decided(verdict="reject", reason="rejected.duplicate", explanation="", policy_hash=POLICY.hash,
                      policy=policy, stage="preflight")
    assert recompute(refused) == []
    assert recompute(msgspec.structs.replace(refused, verdict="keep")) != []


def test_the_test_track_says_that_it_means_nothing() -> None:
    policy = dataclasses.replace(POLICY, for_tests_only=True)
    for d in ([0.05] * 4, [-0.05] * 4):
        assert "means nothing" in judge(policy, gains(d)).explanation


@given(differences)
@settings(deadline=None)
def test_every_reason_has_words(d: list[float]) -> None:
    decided = judge(POLICY, gains(d))
    assert decided.reason in REASONS and REASONS[decided.reason] in decided.explanation


def test_figures_of_two_fingerprints_are_never_compared() -> None:
    control, candidate = gains([0.03, 0.031, 0.029], fingerprint="b" * 64)
    control = [msgspec.structs.replace(r, fingerprint="a" * 64) for r in control]
    with pytest.raises(GateError, match=r"fingerprint differs: aaaaaaaaaaaa .* bbbbbbbbbbbb"):
        judge(POLICY, (control, candidate))
    old = [msgspec.structs.replace(r, fingerprint="") for r in control]  # written before it was recorded
    assert judge(POLICY, (old, candidate)).verdict == "keep"
