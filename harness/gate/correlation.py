"""How far two sets of figures go together, and how sure that is: the statistics of calibration and panel. Pure.

Intervals are two-sided and hold at :data:`LEVEL` unless another level is asked for. At the end: which calibration
counts, and what it and the verdicts give the gate's noise pool.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.gate.noise import Noise, NoiseError, pool_decided, shipped
from harness.gate.policy import Policy
from ledger.records import CalibrationMeasured, Decided, TrialProposed

LEVEL = 0.90


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and its interval."""

    value: float
    low: float
    high: float


def same_seed(runs: Sequence[Sequence[float]], level: float = LEVEL) -> Estimate:
    """Correlation of two configurations' scores on one seed, from ``runs``: [configurations >= 2][seeds >= 2].

    Seeds are rows and configurations columns of a two-way layout. With n seeds, m configurations, MSB the mean
    square between seeds and MSE the residual one (each configuration's own mean taken out, so that an edit's gain
    plays no part):

        value = (MSB - MSE) / (MSB + (m - 1) MSE),     (MSB / MSE) (1 - rho) / (1 + (m - 1) rho) ~ F[n-1, (n-1)(m-1)]

    This is the consistency form of the intraclass correlation: ICC(3,1) of Shrout & Fleiss, Psychological Bulletin
    86 (1979), 420-428; interval as in McGraw & Wong, Psychological Methods 1 (1996), 30-46. For one edit (m = 2) it
    is 1 - var_d / (2 var_run) with var_run the mean variance of both sides, and F is the ratio of the variances of
    sums and differences (Pitman 1939, Morgan 1939).

    Why not Fisher's z of Pearson's r: z wants its 1 / (n - 3), a wide guess at 4 seeds, and it knows nothing of
    equal variances. A small edit leaves the spread over seeds as it was, which is what the gate assumes anyway;
    under normal errors of equal variances and equal correlations this interval is exact from 2 seeds on. Edits of
    unequal noise break that; ``tests/harness/test_gate_correlation.py`` holds the coverage that is left.

    Figures without any spread say nothing: 0 in [-1, 1]. Raises NoiseError on too few, unequal or non-finite ones.
    """
    import numpy as np
    from scipy.stats import f

    m, n = len(runs), len(runs[0]) if runs else 0
    if m < 2 or n < 2 or any(len(r) != n for r in runs):
        raise NoiseError(f"runs of {[len(r) for r in runs]} seeds per configuration; valid: at least 2 configurations "
                         "on the same seeds, at least 2 of them")
    x = np.array(runs, dtype=float)
    if not np.isfinite(x).all():
        raise NoiseError("a non-finite score among the runs; only finite figures are correlated")
    x = x - x.mean(axis=1, keepdims=True)  # [m, n], each configuration around its own mean
    seeds = x.mean(axis=0)
    between = m * float((seeds**2).sum()) / (n - 1)
    rest = float(((x - seeds) ** 2).sum()) / ((n - 1) * (m - 1))
    if between == 0.0 and rest == 0.0:
        return Estimate(value=0.0, low=-1.0, high=1.0)
    if rest == 0.0:
        return Estimate(value=1.0, low=1.0, high=1.0)
    ratio, tail, df = between / rest, 1.0 - (1.0 - level) / 2.0, (n - 1, (n - 1) * (m - 1))

    def rho(observed: float) -> float:
        return (observed - 1.0) / (observed + m - 1.0)

    return Estimate(value=rho(ratio), low=rho(ratio / float(f.ppf(tail, *df))),
                    high=rho(ratio * float(f.ppf(tail, *df[::-1]))))


def pooled_sigma(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """(standard deviation, degrees of freedom) pooled over groups, each around its own mean.

    Groups of one figure say nothing and are passed over. Raises NoiseError when nothing is left or a figure is
    not finite.
    """
    squares, df = 0.0, 0
    for group in groups:
        if not all(math.isfinite(v) for v in group):
            raise NoiseError(f"{list(group)!r}: only finite figures have a spread")
        if len(group) > 1:
            mean = math.fsum(group) / len(group)
            squares += math.fsum((v - mean) ** 2 for v in group)
            df += len(group) - 1
    if df == 0:
        raise NoiseError("no group of two figures or more: there is no spread to pool")
    return math.sqrt(squares / df), df


def shared_df(seeds: int, edits: int) -> float:
    """Degrees of freedom of sigma_d pooled over ``edits`` that all run against one incumbent on the same seeds.

    Fewer than edits * (seeds - 1): differences that share the incumbent's run correlate by 1/2 where all runs are
    equally noisy, so the variances around them by 1/4 (Satterthwaite: 2 E^2 / Var of the pooled variance).
    """
    return edits * (seeds - 1) / (1.0 + (edits - 1) / 4.0)


def sigma_interval(sigma: float, df: float, level: float = LEVEL) -> tuple[float, float]:
    """(low, high) of a normal standard deviation estimated as ``sigma`` with ``df`` degrees of freedom."""
    from scipy.stats import chi2

    tail = (1.0 - level) / 2.0
    return sigma * math.sqrt(df / float(chi2.ppf(1.0 - tail, df))), sigma * math.sqrt(df / float(chi2.ppf(tail, df)))


def proportion(hits: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """(low, high) of a probability after ``hits`` of ``n``: Clopper & Pearson, Biometrika 26 (1934), 404-413.

    Its coverage is never under ``level``, which counts here: panels have a handful of better configurations, where
    Wilson's interval may fall short. (0, 1) when n = 0.
    """
    from scipy.stats import beta

    tail = (1.0 - level) / 2.0
    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1.0 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return low, high


def kendall(
    x: Sequence[float], y: Sequence[float], *, level: float = LEVEL, resamples: int = 4000, seed: int = 0,
) -> Estimate:
    """Kendall's tau-b of two rankings of the same things, with a percentile bootstrap interval over the things.

    tau-b counts ties (Kendall, Biometrika 33 (1945), 239-251). A resample draws the things with replacement; one
    drawn twice ties with itself, which tau-b takes out of both denominators. Two cautions: measurement error of x
    and y is inside the figures, not added by the bootstrap; and a perfect order (tau = 1) stays perfect in every
    resample, so that the interval of few things in perfect order is too narrow.

    A side that is all ties has no order: 0 in [-1, 1]. Deterministic in ``seed``. Raises NoiseError on unequal
    lengths, fewer than two things, or non-finite figures.
    """
    import numpy as np
    from scipy.stats import kendalltau

    if len(x) != len(y) or len(x) < 2:
        raise NoiseError(f"{len(x)} and {len(y)} figures; valid: equally many, at least 2")
    a, b = np.array(x, dtype=float), np.array(y, dtype=float)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise NoiseError("a non-finite figure has no rank")
    value = float(kendalltau(a, b, variant="b")[0])  # type: ignore[arg-type]
    if not math.isfinite(value):
        return Estimate(value=0.0, low=-1.0, high=1.0)
    order_a, order_b = np.sign(np.subtract.outer(a, a)), np.sign(np.subtract.outer(b, b))
    # A thing drawn w times stands in w times as many pairs, so that a resample is a vector of counts.
    draws = np.random.default_rng(seed).multinomial(len(a), np.full(len(a), 1.0 / len(a)), size=resamples)

    def pairs(matrix: np.ndarray) -> np.ndarray:
        return np.einsum("bi,ij,bj->b", draws, matrix, draws, optimize=True)

    scale = np.sqrt(pairs(order_a**2) * pairs(order_b**2))
    taus = pairs(order_a * order_b)[scale > 0] / scale[scale > 0]
    if not len(taus):
        return Estimate(value=value, low=-1.0, high=1.0)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(taus, [tail, 1.0 - tail])
    return Estimate(value=value, low=float(low), high=float(high))


@dataclass(frozen=True, kw_only=True)
class Kills:
    """What a veto did to configurations whose true sign is known (well enough)."""

    better: int  # confirm gain above the margin
    better_killed: int
    worse: int  # confirm gain below minus the margin
    worse_killed: int

    @property
    def false_kill(self) -> float:
        """Share of the better ones that were killed; 0 when there are none (``better`` tells)."""
        return self.better_killed / self.better if self.better else 0.0

    @property
    def true_kill(self) -> float:
        """Share of the worse ones that were killed; 0 when there are none."""
        return self.worse_killed / self.worse if self.worse else 0.0


def kills(gains: Sequence[float], killed: Sequence[bool], margin: float) -> Kills:
    """Count ``killed`` among the better (gain > ``margin``) and the worse (gain < -``margin``).

    What lies between is neither: nothing is lost when it goes, nothing gained when it stays.
    """
    pairs = list(zip(gains, killed, strict=True))
    return Kills(
        better=sum(g > margin for g, _ in pairs), better_killed=sum(k for g, k in pairs if g > margin),
        worse=sum(g < -margin for g, _ in pairs), worse_killed=sum(k for g, k in pairs if g < -margin))


def calibration_for(records: Iterable[Any], fingerprint: str) -> CalibrationMeasured | None:
    """The last calibration under this very fingerprint, if there is one. ``records``: the ledger's, of any search."""
    found = None
    for r in records:
        if isinstance(r.body, CalibrationMeasured) and r.body.fingerprint == fingerprint:
            found = r.body
    return found


def noise_inputs(
    calibration: CalibrationMeasured,
) -> tuple[list[tuple[list[float], list[float]]], list[list[float]]]:
    """(pairs, runs) for :func:`harness.gate.noise.pool`: each edit as a trial's control and candidate val_bpb by seed.

    ``runs``: the incumbent's runs on seeds beyond the edits'; the others are in the pairs already, and count once.
    With several edits the pool meets the incumbent's seeds once for each: sigma_run then claims that many times the
    degrees of freedom it has, which only weights it against the shipped scale (no verdict counts more of them than
    ``shrink_df``).
    """
    pairs = []
    for edit in calibration.edits:
        control = list(calibration.values[:len(edit.differences)])
        pairs.append((control, [c - d for c, d in zip(control, edit.differences, strict=True)]))
    rest = list(calibration.values[max((len(c) for c, _ in pairs), default=0):])
    return pairs, [rest] if len(rest) > 1 else []


def noise_before(policy: Policy, decided: Iterable[Decided], calibration: CalibrationMeasured | None) -> Noise:
    """The pool that a verdict starts from: earlier verdicts of this fingerprint and its calibration."""
    pairs, runs = noise_inputs(calibration) if calibration else ([], [])
    return pool_decided(policy, decided, runs, pairs)


def ledger_noise(policy: Policy, records: Sequence[Any], fingerprint: str) -> tuple[Noise, str]:
    """(noise pool, where it is from): verdicts and calibration under ``fingerprint``, else the policy's prior alone."""
    ours: set[tuple[str, str]] = set()
    decided: list[Decided] = []
    for r in records:
        if isinstance(r.body, TrialProposed) and r.body.fingerprint == fingerprint:
            ours.add((r.search, r.trial))
        elif isinstance(r.body, Decided) and r.body.stage == "confirm" and (r.search, r.trial) in ours:
            decided.append(r.body)
    calibration = calibration_for(records, fingerprint)
    parts = [f"{len(decided)} verdict{'s' if len(decided) != 1 else ''}"] if decided else []
    edits = len(calibration.edits) if calibration else 0
    parts += [f"a calibration of {edits} edit{'s' if edits != 1 else ''}"] if calibration else []
    if not parts:
        return shipped(policy), f"nothing measured under this fingerprint, so the scale of: {policy.prior.source}"
    words = " and ".join(parts) + " under this fingerprint, joined with the scale of: " + policy.prior.source
    return noise_before(policy, decided, calibration), words
