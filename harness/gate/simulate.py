"""Monte Carlo of the confirm design: how often the gate keeps what it should not, and misses what it should.

The whole paired design runs vectorised over trials: per-edit noise, control bank, shrinkage, looks, futility.
numpy only; every function takes a seed and is deterministic in it. A candidate's bytes and time are taken
to equal the incumbent's, so utility = gain. All gains and sigmas in bpb.

Model: on seed k the control scores C_k, the candidate C_k - gain + e, so that the difference is
gain + s z with s the edit's own sigma_d, drawn log-normally around the track's. A share ``shared`` of the
variance of a difference comes from the control's run and is common to all trials judged against one bank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.gate.boundaries import efficacy, t_upper, to_t
from harness.gate.looks import controls_at, information
from harness.gate.noise import Noise, form, pool, shipped
from harness.gate.policy import Policy

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Counts = NDArray[np.int64]

TRUE_SHARE = 0.1  # of proposals that are true gains: the prior for which error rates are stated


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Outcome of many trials of one kind."""

    gain: float  # true, bpb
    p_keep: float
    mc_error: float  # standard error of p_keep
    runs: float  # mean candidate confirm runs
    claimed: float  # mean claimed gain of the kept ones, bpb (0 when none)


def typical_sigma(policy: Policy) -> float:
    """The sigma that "gain in sigmas" counts in: of a difference (paired) or of a run (two-sample)."""
    paired = form(policy, shipped(policy)) == "paired"
    return policy.prior.sigma_d if paired else policy.prior.sigma_run


def edit_sigmas(policy: Policy, n: int, rng: np.random.Generator, sigma: float | None = None) -> Floats:
    """[n] true sigma_d of edits: all ``sigma``, or log-normal with the prior's median and spread."""
    if sigma is not None:
        return np.full(n, sigma)
    return policy.prior.sigma_d * np.exp(policy.prior.spread * rng.standard_normal(n))


def draw(
    policy: Policy, gain: float, trials: int, rng: np.random.Generator, *, sigma: float | None = None,
    per_bank: int = 1, shared: float = 0.5,
) -> Floats:
    """[trials, pairs] differences (positive = better). ``per_bank`` consecutive trials share a control bank.

    The bank's part of a difference scales with the edit's own sigma.
    """
    pairs, banks = policy.max_pairs, math.ceil(trials / per_bank)
    own = rng.standard_normal((trials, pairs))
    if per_bank > 1:
        bank = np.repeat(rng.standard_normal((banks, pairs)), per_bank, axis=0)[:trials]
        own = math.sqrt(shared) * bank + math.sqrt(1.0 - shared) * own
    return gain + edit_sigmas(policy, trials, rng, sigma)[:, None] * own


def judge(policy: Policy, noise: Noise, differences: Floats) -> tuple[Flags, Counts]:
    """(kept [trials], candidate runs used [trials]) of the paired design on ``differences`` [trials, pairs].

    The arithmetic of :func:`looks.take`, over arrays; a test holds the two against each other.
    """
    def estimate(live: Flags, n: int) -> tuple[Floats, Floats, int]:
        d = differences[live, :n]
        mean = d.mean(axis=1)
        return mean, ((d - mean[:, None]) ** 2).sum(axis=1), n - 1

    df0 = min(policy.shrink_df, noise.df)
    return _sequential(policy, "paired", noise.sigma_d, df0, len(differences), estimate)


def judge_two_sample(
    policy: Policy, noise: Noise, control: Floats, candidate: Floats,
) -> tuple[Flags, Counts]:
    """The same for unpaired runs: ``control`` [trials, controls at the last look], ``candidate`` [trials, pairs]."""
    def estimate(live: Flags, n: int) -> tuple[Floats, Floats, int]:
        c, x = control[live, : controls_at(policy, n)], candidate[live, :n]
        mc, mx = c.mean(axis=1), x.mean(axis=1)
        squares = ((c - mc[:, None]) ** 2).sum(axis=1) + ((x - mx[:, None]) ** 2).sum(axis=1)
        return mc - mx, squares, c.shape[1] + n - 2

    df0 = min(policy.shrink_df, noise.run_df)
    return _sequential(policy, "two-sample", noise.sigma_run, df0, len(candidate), estimate)


def _sequential(
    policy: Policy, form: str, sigma0: float, df0: float, trials: int,
    estimate: Callable[[Flags, int], tuple[Floats, Floats, int]],
) -> tuple[Flags, Counts]:
    """Every look over arrays. ``estimate(live, n)``: gain, sum of squares [live], its degrees of freedom."""
    info = tuple(information(policy, n, form) for n in policy.looks)
    z = efficacy(info, policy.alpha, policy.spending)
    last = policy.looks[-1]
    dofs = [n - 1 if form == "paired" else n + controls_at(policy, n) - 2 for n in policy.looks]
    final = to_t(z[-1], df0 + dofs[-1]) / math.sqrt(info[-1])
    kept, used = np.zeros(trials, dtype=bool), np.zeros(trials, dtype=np.int64)
    live = np.ones(trials, dtype=bool)
    for k, n in enumerate(policy.looks):
        mean, squares, dof = estimate(live, n)
        df = df0 + dof
        sigma = np.sqrt((df0 * sigma0**2 + squares) / df)
        keep = mean - to_t(z[k], df) * sigma / math.sqrt(info[k]) > policy.materiality_bpb
        stop = np.full(len(mean), n == last)
        if n != last and policy.futility_power > 0.0:
            spread = t_upper(policy.futility_power, df) * math.sqrt(1.0 / info[k] - 1.0 / info[-1])
            stop = mean < policy.materiality_bpb + sigma * (final - spread)
        index = np.flatnonzero(live)
        kept[index[keep]] = True
        over = keep | stop
        used[index[over]] = n
        live[index[over]] = False
    return kept, used


def rates(
    policy: Policy, gain: float, *, trials: int = 100_000, seed: int = 0, sigma: float | None = None,
    noise: Noise | None = None,
) -> Rates:
    """What becomes of ``trials`` independent edits of true gain ``gain`` (each with a bank of its own).

    In the paired form ``sigma`` fixes every edit's sigma_d; in the two-sample form it is the runs' sigma
    (the prior's sigma_run by default), the same for all.
    """
    rng, noise = np.random.default_rng(seed), noise or shipped(policy)
    rows = np.arange(trials)
    if form(policy, noise) == "paired":
        d = draw(policy, gain, trials, rng, sigma=sigma)
        kept, used = judge(policy, noise, d)
        at_stop = np.cumsum(d, axis=1)[rows, used - 1] / used
    else:
        s = sigma or policy.prior.sigma_run
        control = s * rng.standard_normal((trials, controls_at(policy, policy.max_pairs)))
        candidate = s * rng.standard_normal((trials, policy.max_pairs)) - gain
        kept, used = judge_two_sample(policy, noise, control, candidate)
        m = np.maximum(used, policy.controls)
        at_stop = np.cumsum(control, axis=1)[rows, m - 1] / m
        at_stop -= np.cumsum(candidate, axis=1)[rows, used - 1] / used
    p = float(kept.mean())
    return Rates(gain=gain, p_keep=p, mc_error=math.sqrt(max(p * (1 - p), 1.0 / trials) / trials),
                 runs=float(used.mean()), claimed=float(at_stop[kept].mean()) if kept.any() else 0.0)


def false_share(p_null: float, p_gain: float, true_share: float = TRUE_SHARE) -> float:
    """Share of keeps that are no gain, when ``true_share`` of the proposals are; 0 when nothing is kept."""
    false, true = (1.0 - true_share) * p_null, true_share * p_gain
    return false / (false + true) if false + true > 0.0 else 0.0


def bank_spread(
    policy: Policy, *, banks: int = 2000, per_bank: int = 40, shared: float = 0.5, sigma: float | None = None,
    seed: int = 0, noise: Noise | None = None,
) -> dict[str, float]:
    """How the false-keep rate of pure-noise trials varies from one control bank to the next.

    Trials that share a bank share its luck: the mean over banks is the usual rate, single banks differ.
    Returns mean, p95, p99 and max over ``banks`` of the rate among ``per_bank`` trials.
    """
    rng = np.random.default_rng(seed)
    d = draw(policy, 0.0, banks * per_bank, rng, sigma=sigma, per_bank=per_bank, shared=shared)
    kept, _ = judge(policy, noise or shipped(policy), d)
    rate = kept.reshape(banks, per_bank).mean(axis=1)
    return {"mean": float(rate.mean()), "p95": float(np.quantile(rate, 0.95)),
            "p99": float(np.quantile(rate, 0.99)), "max": float(rate.max())}


def pooled_noise(policy: Policy, *, trials: int = 40, seed: int = 0) -> Noise:
    """The pool after ``trials`` earlier edits drawn from the track's own distribution of sigmas."""
    rng = np.random.default_rng(seed)
    runs = policy.prior.sigma_run * rng.standard_normal((trials, policy.max_pairs))
    d = draw(policy, 0.0, trials, rng)
    return pool(policy, [(c.tolist(), (c - x).tolist()) for c, x in zip(runs, d, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of DESIGN section 6 item 6, for one policy."""

    track: str
    null: Rates  # true gain 0
    at_materiality: Rates  # true gain = materiality: the null's edge, where alpha is spent
    target: Rates  # at the target gain
    powers: tuple[Rates, ...]  # at 1, 2, 3 sigma of an edit of typical noise
    false_share: float  # of keeps, at a prior of 1 in 10 and the target gain
    runs: float  # mean candidate runs per trial under that prior


def summary(
    policy: Policy, target_gain: float, *, trials: int = 100_000, seed: int = 0, sigma: float | None = None,
    noise: Noise | None = None,
) -> Summary:
    """Rates of ``policy``; edits' sigmas from the prior's distribution, or all ``sigma``."""
    def at(gain: float, offset: int, sigma: float | None = sigma) -> Rates:
        return rates(policy, gain, trials=trials, seed=seed + offset, sigma=sigma, noise=noise)

    typical = sigma or typical_sigma(policy)

    null, target = at(0.0, 0), at(target_gain, 1)
    return Summary(
        track=policy.track, null=null, at_materiality=at(policy.materiality_bpb, 2), target=target,
        powers=tuple(at(m * typical, 2 + m, typical) for m in (1, 2, 3)),
        false_share=false_share(null.p_keep, target.p_keep),
        runs=(1 - TRUE_SHARE) * null.runs + TRUE_SHARE * target.runs)
