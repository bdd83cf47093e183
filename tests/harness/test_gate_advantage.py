"""Keeps without a gain, step times that took turns, converged bytes, early stops: the gate beside the score."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from scipy import stats

from harness.gate.boundaries import efficacy
from harness.gate.checks import Converged, GateError
from harness.gate.early import checkpoint, dev_every, stops
from harness.gate.noise import shipped
from harness.gate.policy import Policy, PolicyError, from_dict
from harness.gate.verdict import Facts, confirm_step, early_verdict, recompute
from ledger.records import Decided
from tests.harness.gate_figures import CAP, POLICY, gains, run

FREE = dataclasses.replace(
    POLICY, timing_pairs=3, cheaper_bytes_fraction=0.02, faster_pct=15.0, simpler_settings=1, time_credit=True,
    noninferiority_bpb=0.004, looks=(2, 4, 8))
EVEN = [[100.0, 100.0]] * 3
TIGHT = [0.0002, -0.0001, 0.0001, 0.0, -0.0002, 0.0001, 0.0, 0.0001]  # no gain, and hardly any noise


def judge(values: list[float], policy: Policy = FREE, changes: dict[str, Any] | None = None, **facts: Any) -> Decided:
    both = gains(values, **(changes or {}))
    return confirm_step(policy, *both, shipped(policy), Facts(**{"cap_bytes": CAP, "timing": EVEN, **facts}))


def lighter(n: int) -> dict[str, Any]:
    return {"artifact_bytes": 600_000 - n}


def test_without_an_advantage_no_gain_is_no_keep() -> None:
    assert judge(TIGHT).verdict == "reject"


def test_fewer_bytes_are_kept_when_the_score_is_not_worse() -> None:
    decided = judge(TIGHT, changes=lighter(30_000))
    assert (decided.verdict, decided.reason) == ("keep", "kept.cheaper")
    assert "30,000 bytes fewer" in decided.explanation
    assert recompute(decided) == []
    assert judge(TIGHT, changes=lighter(19_999)).verdict == "reject", "less than 2% of the cap is not material"


def test_fewer_bytes_do_not_buy_a_worse_score() -> None:
    worse = judge([v - 0.006 for v in TIGHT], changes=lighter(30_000))
    assert worse.verdict == "reject"
    dear = dataclasses.replace(FREE, price_mb=0.01)  # 30 kB are worth 0.0003 there
    within = judge([v - 0.001 for v in TIGHT], dear, lighter(30_000))
    assert within.verdict == "reject", "inside the margin, but the bytes do not pay for what is lost"
    assert "does not pay" in within.explanation


def test_less_time_is_kept_only_when_every_turn_agrees() -> None:
    quick = [[100.0, 80.0], [110.0, 85.0], [95.0, 80.0]]
    assert judge(TIGHT, timing=quick).reason == "kept.faster"
    mixed = [[100.0, 80.0], [110.0, 85.0], [79.0, 80.0]]
    assert judge(TIGHT, timing=mixed).verdict == "reject"
    assert judge(TIGHT, timing=[[100.0, 90.0]] * 3).verdict == "reject", "10% is inside what timing noise can do"


def test_fewer_settings_are_kept_when_nothing_is_lost() -> None:
    assert judge(TIGHT, simpler=1).reason == "kept.simpler"
    assert judge(TIGHT, simpler=-1).verdict == "reject"
    assert judge([v - 0.006 for v in TIGHT], simpler=1).verdict == "reject"
    heavy = judge(TIGHT, changes=lighter(-30_000), simpler=1)
    assert heavy.verdict == "reject", "simpler, but heavier"


def test_a_real_gain_is_called_a_gain_whatever_else_it_has() -> None:
    assert judge([0.03 + v for v in TIGHT], changes=lighter(30_000), simpler=1).reason == "kept.gain"


@given(st.lists(st.floats(-0.02, 0.02), min_size=8, max_size=8), st.integers(-2, 2), st.integers(-60_000, 60_000))
@settings(max_examples=60, deadline=None)
def test_any_keep_has_a_bound_above_its_own_aim(values: list[float], simpler: int, saved: int) -> None:
    decided = judge(values, changes=lighter(saved), simpler=simpler)
    assert recompute(decided) == []
    if decided.verdict != "keep":
        return
    look = decided.looks[-1]
    index = FREE.looks.index(look.n)
    z = efficacy(tuple(map(float, FREE.looks)), FREE.alpha, FREE.spending)[index]
    bound = stats.t.isf(stats.norm.sf(z), look.df) * look.se
    gain = -(decided.delta_bpb or 0.0)
    if decided.reason == "kept.gain":
        assert look.mean - bound > FREE.materiality_bpb - 1e-12
    else:
        assert gain - bound > -FREE.noninferiority_bpb - 1e-12
        assert saved >= 20_000 or simpler >= 1


# Step times.


def test_a_keep_waits_for_step_times_that_took_turns() -> None:
    good = [0.03 + v for v in TIGHT]
    waits = judge(good, timing=[[100.0, 100.0]])
    assert (waits.verdict, waits.needed_timing, waits.needed_pairs) == ("continue", 3, 0)
    assert judge(good).verdict == "keep"
    assert judge([-0.03] * 8, timing=[]).verdict == "reject", "what is rejected anyway waits for nothing"


def test_turns_count_not_the_runs_own_times() -> None:
    slow_runs = {"step_ms": 400.0}  # five times the control's: an hour when the machine was busy
    assert judge([0.03 + v for v in TIGHT], changes=slow_runs).reason == "kept.gain"
    truly = judge([0.03 + v for v in TIGHT], timing=[[100.0, 200.0]] * 3)
    assert (truly.verdict, truly.reason) == ("reject", "rejected.runtime")
    unsure = judge([0.03 + v for v in TIGHT], timing=[[100.0, 200.0]])
    assert unsure.needed_timing == 3, "nor is it rejected for time on a single pair"


def test_a_policy_of_before_judges_as_before() -> None:
    old = dataclasses.replace(POLICY, timing_pairs=0)
    assert judge([0.03, 0.031, 0.029], old, {"step_ms": 400.0}, timing=EVEN).reason == "rejected.runtime"


@pytest.mark.parametrize("pair", [[1.0], [0.0, 1.0], [float("nan"), 1.0], [1.0, -2.0]])
def test_impossible_times_are_refused(pair: list[float]) -> None:
    with pytest.raises(GateError, match="timing pair"):
        judge(TIGHT, timing=[pair])


# Bytes of a model trained for long.


def test_what_will_not_fit_when_trained_for_long_is_rejected() -> None:
    sizes = {"payload_bytes": 700_000}
    decided = judge([0.03] * 8, changes=sizes, converged=Converged(ratio=0.95, cap_bytes=680_000))
    assert (decided.reason, decided.verdict) == ("rejected.bytes", "reject")
    assert "685000" in decided.explanation
    assert recompute(decided) == []
    assert judge([0.03] * 8, changes=sizes, converged=Converged(ratio=0.95, cap_bytes=685_000)).verdict == "keep"
    assert judge([0.03] * 8, converged=Converged(ratio=0.95, cap_bytes=1)).verdict == "keep", "payload unknown: passes"


# Early stops.

EARLY = dataclasses.replace(POLICY, early_fractions=(0.25, 0.5), early_nats=(0.3, 0.1))


def test_an_early_stop_is_decided_by_the_incumbents_curve_alone() -> None:
    control = run(0, 2.4, "c", dev=[[15, 6.0], [30, 5.0]], steps=60)
    assert stops(EARLY, control, 15, 60, 6.29) is None
    assert stops(EARLY, control, 16, 60, 9.0) is None, "not a checkpoint"
    assert stops(EARLY, control, 30, 60, float("nan")) is None
    assert stops(EARLY, run(0, 2.4, "c"), 30, 60, 9.0) is None, "never without the incumbent's"
    stop = stops(EARLY, control, 30, 60, 5.2)
    assert stop and (stop.threshold, stop.control, stop.candidate) == (0.1, 5.0, 5.2)
    decided = early_verdict(EARLY, [control], stop, shipped(EARLY), cost_seconds=7.0)
    assert decided and (decided.reason, decided.stage, decided.cost_seconds) == ("rejected.worse", "breadth", 7.0)
    assert recompute(decided) == []
    liar = structs.replace(decided, early=structs.replace(stop, candidate=5.05))
    assert recompute(liar) != []


@given(st.lists(st.floats(0.05, 0.95), min_size=1, max_size=4, unique=True), st.integers(1, 500))
def test_every_checkpoint_is_among_the_dev_checks(fractions: list[float], steps: int) -> None:
    policy = dataclasses.replace(POLICY, early_fractions=tuple(sorted(fractions)), early_nats=(1.0,) * len(fractions))
    every = dev_every(policy, steps)
    assert every >= 1
    assert all(checkpoint(f, steps) % every == 0 for f in policy.early_fractions)
    assert dev_every(POLICY, steps) == 0


@pytest.mark.parametrize("change", [
    {"early_fractions": [0.5], "early_nats": []}, {"early_fractions": [0.5, 0.2], "early_nats": [1.0, 1.0]},
    {"early_fractions": [1.0], "early_nats": [1.0]}, {"early_fractions": [0.5], "early_nats": [0.0]},
])
def test_a_policy_whose_early_stop_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match="early_"):
        from_dict(change)
