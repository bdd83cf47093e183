"""Policies are designed, not guessed: combinations tried against stated targets, cheapest first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from harness.gate.policy import SPENDINGS, Policy
from harness.gate.simulate import TRUE_SHARE, false_share, rates, typical_sigma


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One policy that :func:`design` tried."""

    alpha: float
    spending: str
    looks: tuple[int, ...]
    shrink_df: float
    null_keep: float
    edge_keep: float  # at gain = materiality
    power: float  # at the target gain
    false_share: float
    runs: float  # per trial under the prior
    meets: bool


def design(
    policy: Policy, target_gain: float, *, sigma: float | None = None, power: float = 0.90,
    share: float = 0.05, max_runs: float = 6.0, alphas: Sequence[float] = (0.005, 0.0075, 0.01, 0.0125, 0.02),
    looks: Sequence[tuple[int, ...]] | None = None, shrink_dfs: Sequence[float] | None = None,
    trials: int = 20_000, seed: int = 0,
) -> list[Choice]:
    """Every combination tried, those that meet the targets first, the cheapest in runs before the others.

    Targets (DESIGN section 6 item 6): P(keep) >= ``power`` at ``target_gain`` with edits of typical noise
    (``sigma``, by default the prior's sigma_d) for at most ``max_runs`` candidate runs; false keeps at most
    ``share`` of keeps at a prior of 1 in 10, over the prior's *whole* spread of sigmas. A keep at a gain
    equal to materiality may not exceed alpha by more than half: the honesty of t at few degrees of freedom.
    """
    out: list[Choice] = []
    for plan in looks or (policy.looks,):
        for alpha in alphas:
            for spending in SPENDINGS:
                for df in shrink_dfs or (policy.shrink_df,):
                    p = dataclasses.replace(policy, looks=plan, alpha=alpha, spending=spending, shrink_df=df)
                    out.append(_try(p, target_gain, sigma or typical_sigma(policy), power, share, max_runs,
                                    trials, seed))
    return sorted(out, key=lambda c: (not c.meets, c.runs if c.meets else -c.power, c.false_share))


def _try(
    p: Policy, gain: float, sigma: float, power: float, share: float, max_runs: float, trials: int, seed: int,
) -> Choice:
    null = rates(p, 0.0, trials=trials, seed=seed)
    edge = rates(p, p.materiality_bpb, trials=trials, seed=seed + 1)
    hit = rates(p, gain, trials=trials, seed=seed + 2, sigma=sigma)
    false = false_share(null.p_keep, hit.p_keep)
    meets = (hit.p_keep >= power and false <= share and hit.runs <= max_runs
             and edge.p_keep <= 1.5 * p.alpha + 2.0 * edge.mc_error)
    return Choice(
        alpha=p.alpha, spending=p.spending, looks=p.looks, shrink_df=p.shrink_df, null_keep=null.p_keep,
        edge_keep=edge.p_keep, power=hit.p_keep, false_share=false,
        runs=(1 - TRUE_SHARE) * null.runs + TRUE_SHARE * hit.runs, meets=meets)
