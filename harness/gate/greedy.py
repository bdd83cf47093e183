"""The other side of the comparison: the field's usual loop, one run each, kept when it looks better."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from harness.gate.policy import Policy
from harness.gate.simulate import TRUE_SHARE, edit_sigmas


@dataclass(frozen=True, kw_only=True)
class Night:
    """A greedy loop's nights: one run per proposal, kept when it beats the best score so far."""

    keeps: float  # per night
    false_share: float  # of keeps that are no gain
    claimed: float  # cumulative gain that the scores show, bpb
    true: float  # cumulative true gain of what was kept, bpb
    harm: float  # P(keep) of a proposal that loses the target gain


def greedy(
    policy: Policy, gain: float, *, proposals: int = 40, nights: int = 2000, paired: bool = False,
    true_share: float = TRUE_SHARE, seed: int = 0,
) -> Night:
    """The field's usual loop, for comparison: no controls, no repeats, a selected score is inherited.

    Every run draws fresh noise of ``sigma_run`` (fresh seeds), or, ``paired``, of sigma_d / sqrt 2 (all
    runs on one seed, as a fixed seed gives). Proposals are true gains with probability ``true_share``,
    otherwise no change, and a tenth of the others lose ``gain``.
    """
    rng = np.random.default_rng(seed)
    base = np.full(nights, policy.prior.sigma_run)
    best_true = np.zeros(nights)
    best_seen = base * rng.standard_normal(nights) * (0.0 if paired else 1.0)
    start_seen = best_seen.copy()
    keeps = np.zeros(nights)
    false = harmful = harmful_kept = 0
    for _ in range(proposals):
        u = rng.random(nights)
        step = np.where(u < true_share, gain, np.where(u > 1.0 - (1.0 - true_share) * 0.1, -gain, 0.0))
        scale = edit_sigmas(policy, nights, rng) / math.sqrt(2.0) if paired else base
        seen = best_true - step + scale * rng.standard_normal(nights)
        keep = seen < best_seen
        keeps += keep
        false += int((keep & (step <= 0.0)).sum())
        harmful += int((step < 0.0).sum())
        harmful_kept += int((keep & (step < 0.0)).sum())
        best_seen = np.where(keep, seen, best_seen)
        best_true = np.where(keep, best_true - step, best_true)
    total = max(1.0, float(keeps.sum()))
    return Night(keeps=float(keeps.mean()), false_share=false / total,
                 claimed=float((start_seen - best_seen).mean()), true=float(-best_true.mean()),
                 harm=harmful_kept / max(1, harmful))
