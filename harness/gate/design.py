"""Policies are designed, not guessed: combinations tried against stated targets, cheapest first.

Also here: on what a simulation rests (the shipped noise, or what the ledger has measured).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

import numpy as np

from harness.gate.correlation import noise_inputs, pooled_sigma
from harness.gate.noise import Noise, form, pool_decided, shipped
from harness.gate.policy import Policy
from harness.gate.simulate import (
    TRUE_SHARE,
    Costs,
    Counts,
    Flags,
    Sums,
    TwoSample,
    draw,
    false_share,
    judge,
    reach,
    sequential,
    typical_sigma,
)
from ledger.records import CalibrationMeasured, Decided

ENOUGH_TRIALS = 6  # confirm verdicts of one fingerprint from which the ledger's own noise is used


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a policy must achieve; stated for a prior of 1 true gain in 10 proposals."""

    power: float = 0.90  # P(keep) at the target gain, edits of typical noise, given that confirm is reached
    runs: float = 6.0  # mean candidate confirm runs there
    false_share: float = 0.05  # of keeps, over the track's whole spread of noise
    alpha_slack: float = 1.5  # P(keep) at a gain equal to materiality, as a multiple of alpha
    overclaim: float = 0.1  # |claimed - true| cumulative gain of a night, in typical sigmas


TARGETS = Targets()


def target_gain(policy: Policy) -> float:
    """The true gain (bpb) that must not be missed, unless another is asked for: 2 typical sigmas."""
    return 2.0 * typical_sigma(policy)


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What a simulation rests on. ``policy``: as judged, its prior holding the true sigmas of the simulated edits."""

    policy: Policy
    noise: Noise  # what the gate starts from
    source: str  # shipped | ledger
    words: str
    trials: int = 0
    effects: tuple[float, ...] = ()  # gains that the ledger's trials measured, shrunk towards their mean, bpb


def basis(
    policy: Policy, decided: Sequence[Decided] = (), calibration: CalibrationMeasured | None = None,
) -> Basis:
    """The ledger's own noise when a calibration or enough verdicts of one fingerprint are there, else the shipped.

    The simulated edits' median sigma follows from the pooled variance: a log-normal of spread s has root mean square
    exp(s^2) times its median. The verdicts' effects, if there are enough, are shrunk towards their mean by empirical
    Bayes: tau^2 / (tau^2 + se^2).
    """
    found = [(pairs, d) for d in decided if len(pairs := _pairs(d)) >= 2]
    more, runs = noise_inputs(calibration) if calibration else ([], [])
    enough = len(found) >= ENOUGH_TRIALS
    if not enough and not more:
        words = f"the policy's shipped noise ({policy.prior.source})"
        if decided:
            words += f"; the ledger has {len(found)} of the {ENOUGH_TRIALS} confirm verdicts that its own would need"
        return Basis(policy=policy, noise=shipped(policy), source="shipped", words=words, trials=len(found))
    sides = [([c for c, _ in p], [x for _, x in p]) for p, _ in found] + [(list(c), list(x)) for c, x in more]
    gains = [[a - b for a, b in zip(c, x, strict=True)] for c, x in sides]
    tiny = 1e-6  # bpb: bit-identical runs have no spread, and a scale of 0 no logarithm
    pooled_d, dof = pooled_sigma(gains)
    rms = max(pooled_d, tiny)
    spread_run = pooled_sigma([side for both in sides for side in both])[0]
    prior = dataclasses.replace(policy.prior, sigma_d=rms * math.exp(-policy.prior.spread**2),
                                sigma_run=max(spread_run, rms / 2.0))
    noise = pool_decided(policy, [d for _, d in found], runs, more)
    parts = [f"{len(found)} confirm verdicts"] if found else []
    parts += [f"a calibration of {len(more)} edits"] if more else []
    words = (f"the ledger's own: {' and '.join(parts)} of one fingerprint, {dof} degrees of freedom, pooled sigma_d "
             f"{rms:.5f} (median {prior.sigma_d:.5f}), sigma_run {prior.sigma_run:.5f}; the gate starts from sigma_d "
             f"{noise.sigma_d:.5f}")
    effects = _shrunk([fmean(g) for g in gains[:len(found)]], [rms**2 / len(g) for g in gains[:len(found)]])
    return Basis(policy=dataclasses.replace(policy, prior=prior), noise=noise, source="ledger", words=words,
                 trials=len(found), effects=effects if enough else ())


def _pairs(decided: Decided) -> list[tuple[float, float]]:
    """(control, candidate) val_bpb of a confirm verdict's pairs."""
    if decided.stage != "confirm":
        return []
    control = {(r.k, r.seed): r.val_bpb for r in decided.control}
    return [(control[r.k, r.seed], r.val_bpb) for r in decided.candidate if (r.k, r.seed) in control]


def _shrunk(effects: Sequence[float], variances: Sequence[float]) -> tuple[float, ...]:
    """Effects drawn towards their mean, the noisier the more. Fewer than two are left as they are."""
    if len(effects) < 2:
        return tuple(effects)
    mean, tau2 = fmean(effects), max(0.0, variance(effects) - fmean(variances))
    return tuple(mean + (e - mean) * (tau2 / (tau2 + v) if tau2 + v > 0.0 else 0.0)
                 for e, v in zip(effects, variances, strict=True))


def own_effects(basis: Basis, *, trials: int = 100_000, seed: int = 0) -> dict[str, float]:
    """The gate over the ledger's own effects: what it would keep of such proposals once they reach confirm."""
    rng = np.random.default_rng(seed)
    gain = rng.choice(np.array(basis.effects), trials)
    kept, used = judge(basis.policy, basis.noise, draw(basis.policy, gain, trials, rng))
    real = gain > basis.policy.materiality_bpb
    return {"p_keep": float(kept.mean()), "p_keep_real": float(kept[real].mean()) if real.any() else 0.0,
            "false_share": float((kept & (gain <= 0.0)).sum() / max(1, kept.sum())), "runs": float(used.mean())}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What :func:`design` tries."""

    looks: tuple[tuple[int, ...], ...] = (
        (2, 3, 4), (3, 4, 5, 6), (2, 4, 6, 8), (2, 3, 4, 6, 8), (2, 4, 5, 6, 7, 8), (3, 4, 5, 6, 7, 8), (4, 6, 8, 10))
    alphas: tuple[float, ...] = (0.005, 0.01, 0.0125, 0.02, 0.03)
    spendings: tuple[str, ...] = ("obrien-fleming", "power-2", "power-1.5", "pocock")
    shrink_dfs: tuple[float, ...] = (2.0, 3.0, 4.0)
    futilities: tuple[float, ...] = (0.05, 0.1, 0.2)
    vetoes: tuple[float, ...] = (0.5, 1.0, 2.0)

    def policies(self, today: Policy) -> Iterator[Policy]:
        """Every combination, without breadth's threshold; today's own first."""
        yield today
        for looks, alpha, spending, df, futility in itertools.product(
                self.looks, self.alphas, self.spendings, self.shrink_dfs, self.futilities):
            policy = dataclasses.replace(today, looks=looks, alpha=alpha, spending=spending, shrink_df=df,
                                         futility_power=futility)
            if policy != today:
                yield policy


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One policy that :func:`design` tried."""

    looks: tuple[int, ...]
    alpha: float
    spending: str
    shrink_df: float
    futility_power: float
    breadth_veto_sigmas: float
    null_keep: float  # P(keep | no gain, confirm reached), over the track's spread of noise
    edge_keep: float  # the same at a gain equal to materiality
    power: float  # P(keep | target gain, confirm reached), edits of typical noise
    power_spread: float  # the same over the track's spread of noise
    power_runs: float  # mean candidate runs at the target gain, typical noise
    reach: float  # P(breadth promotes | target gain)
    false_share: float
    cost: float  # mean cost of a proposal under the prior, in confirm runs: breadth and confirm, no controls
    cost_per_keep: float  # the same for each true gain that is kept
    meets: bool
    today: bool = False


class _Draws:
    """The same simulated trials for every policy of a search, so that choices differ by design and not by luck."""

    def __init__(self, basis: Basis, widest: Policy, gains: Sequence[tuple[float, float | None]], trials: int,
                 seed: int) -> None:
        self.noise, self.form = basis.noise, form(basis.policy, basis.noise)
        self.drawn: list[tuple[Sums, Sums | None]] = []
        for i, (gain, sigma) in enumerate(gains):
            rng = np.random.default_rng([seed, i])
            if self.form == "paired":
                self.drawn.append((Sums(draw(widest, gain, trials, rng, sigma=sigma)), None))
            else:
                s, width = widest.prior.sigma_run, max(widest.max_pairs, widest.controls)
                candidate = Sums(s * rng.standard_normal((trials, widest.max_pairs)) - gain)
                self.drawn.append((candidate, Sums(s * rng.standard_normal((trials, width)))))

    def judge(self, policy: Policy, i: int) -> tuple[Flags, Counts]:
        candidate, control = self.drawn[i]
        if control is None:
            return judge(policy, self.noise, candidate)
        df0 = min(policy.shrink_df, self.noise.run_df)
        return sequential(policy, self.form, self.noise.sigma_run, df0, candidate.trials,
                          TwoSample(policy, control, candidate))


def design(
    basis: Basis, gain: float, *, targets: Targets = TARGETS, grid: Grid | None = None, costs: Costs | None = None,
    trials: int = 10_000, seed: int = 0, best: int = 24,
) -> list[Choice]:
    """The ``best`` of all combinations and today's policy; those that meet the targets first, the cheapest ahead.

    Cheap = confirm-run lengths spent for each true gain kept, when 1 proposal in 10 is a true gain of ``gain`` bpb
    and the others change nothing. What a keep costs afterwards is the same for all and left out. All combinations
    are tried on ``trials`` simulated trials of each kind; the best of that are tried again on ten times as many fresh
    ones, because the best of many noisy figures flatter.
    """
    today, grid, costs = basis.policy, grid or Grid(), costs or Costs()
    rough = _rank(basis, grid.policies(today), gain, targets, grid, costs, trials, seed)
    chosen = [p for p, _ in rough[:best]] + [p for p, _ in rough[best:] if p == today]
    again = _rank(basis, chosen, gain, targets, None, costs, 10 * trials, seed + 1)
    return [choice for _, choice in again]


def achieved(
    basis: Basis, gain: float, *, targets: Targets = TARGETS, costs: Costs | None = None, trials: int = 100_000,
    seed: int = 0,
) -> Choice:
    """Today's policy by the same measures."""
    return _rank(basis, [basis.policy], gain, targets, None, costs or Costs(), trials, seed)[0][1]


def _rank(
    basis: Basis, policies: Iterable[Policy], gain: float, targets: Targets, grid: Grid | None, costs: Costs,
    trials: int, seed: int,
) -> list[tuple[Policy, Choice]]:
    """Policies (with every breadth threshold of ``grid``, or their own) and what they achieve, best first."""
    today, tried = basis.policy, list(policies)
    widest = dataclasses.replace(today, looks=max((p.looks for p in tried), key=lambda looks: looks[-1]))
    typical = typical_sigma(today) if form(today, basis.noise) == "paired" else None
    points = [(0.0, None), (today.materiality_bpb, None), (gain, typical), (gain, None)]
    draws = _Draws(basis, widest, points, trials, seed)
    reached: dict[tuple[float, float, float], float] = {}

    def promote(policy: Policy, at: float) -> float:
        key = (policy.shrink_df, policy.breadth_veto_sigmas, at)
        if key not in reached:
            reached[key] = reach(policy, at, noise=basis.noise, trials=50_000, seed=seed)
        return reached[key]

    out: list[tuple[Policy, Choice]] = []
    for policy in tried:
        judged = [draws.judge(policy, i) for i in range(len(points))]
        own = (policy.breadth_veto_sigmas,)
        for veto in dict.fromkeys((*own, *grid.vetoes) if grid else own):
            p = dataclasses.replace(policy, breadth_veto_sigmas=veto)
            out.append((p, _choice(p, judged, promote(p, 0.0), promote(p, gain), targets, costs, trials, p == today)))
    return sorted(out, key=lambda row: (
        not row[1].meets, row[1].cost_per_keep if row[1].meets else -min(row[1].power, targets.power),
        row[1].false_share))


def _choice(
    p: Policy, judged: Sequence[tuple[Flags, Counts]], reach_null: float, reach_gain: float, targets: Targets,
    costs: Costs, trials: int, today: bool,
) -> Choice:
    """One row. ``judged``: at no gain, at materiality, at the target with typical noise, at the target over all."""
    null, edge, power, spread = (float(kept.mean()) for kept, _ in judged)
    runs = [float(used.mean()) for _, used in judged]
    false = false_share(reach_null * null, reach_gain * spread)
    cost = p.breadth_pairs * costs.breadth + (
        (1.0 - TRUE_SHARE) * reach_null * runs[0] + TRUE_SHARE * reach_gain * runs[3])
    kept = TRUE_SHARE * reach_gain * spread
    error = math.sqrt(max(edge * (1.0 - edge), 1.0 / trials) / trials)
    meets = (power >= targets.power and runs[2] <= targets.runs and false <= targets.false_share
             and edge <= targets.alpha_slack * p.alpha + 2.0 * error)
    return Choice(
        looks=p.looks, alpha=p.alpha, spending=p.spending, shrink_df=p.shrink_df, futility_power=p.futility_power,
        breadth_veto_sigmas=p.breadth_veto_sigmas, null_keep=null, edge_keep=edge, power=power, power_spread=spread,
        power_runs=runs[2], reach=reach_gain, false_share=false, cost=cost,
        cost_per_keep=cost / kept if kept > 0.0 else math.inf, meets=meets, today=today)


@dataclass(frozen=True)
class Goal:
    """One target, in words, with what was achieved, and whether that meets it."""

    words: str
    value: float
    met: bool


def goals(now: Choice, targets: Targets = TARGETS) -> list[Goal]:
    """The per-trial targets held against a policy."""
    t, edge = targets, targets.alpha_slack * now.alpha
    return [
        Goal(f"P(keep) at the target gain {now.power:.1%}, at least {t.power:.0%} wanted (edits of typical noise, "
             f"confirm reached; over the spread of noise {now.power_spread:.1%})", now.power, now.power >= t.power),
        Goal(f"candidate confirm runs there {now.power_runs:.2f}, at most {t.runs:g} wanted", now.power_runs,
             now.power_runs <= t.runs),
        Goal(f"false keeps {now.false_share:.1%} of keeps, at most {t.false_share:.0%} wanted (1 proposal in 10 is a "
             "gain of that size, the others change nothing)", now.false_share, now.false_share <= t.false_share),
        Goal(f"P(keep) at a gain equal to materiality {now.edge_keep:.2%}, at most {edge:.2%} wanted (alpha "
             f"{now.alpha:g}, and the {t.alpha_slack - 1.0:.0%} of it that an estimated sigma may cost)", now.edge_keep,
             now.edge_keep <= edge),
    ]
