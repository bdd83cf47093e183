"""Monte Carlo of the gate's design: how often it keeps what it should not, and misses what it should.

The whole confirm design runs vectorised over trials: per-edit noise, control bank, shrinkage, looks, futility;
so does breadth's veto. Here: rates per trial. Whole nights, beside other rules: ``harness.gate.rivals``.
numpy only; every function takes a seed and is deterministic in it. A candidate's bytes and time are taken
to equal the incumbent's, so utility = gain. All gains and sigmas in bpb.

Model: on seed k the control scores C_k, the candidate C_k - gain + e, so that the difference is
gain + s z with s the edit's own sigma_d, drawn log-normally around the track's. A share ``shared`` of the
variance of a difference comes from the control's run and is common to all trials judged against one bank.
A breadth run sees another effect than confirm does (``World.disagreement``) with noise of its own.
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
Estimate = Callable[[Flags, int], tuple[Floats, Floats]]
"""(undecided trials [trials], n) -> their gain and their sum of squares at n candidate runs."""

TRUE_SHARE = 0.1  # of proposals that are true gains: the prior for which error rates are stated


@dataclass(frozen=True, kw_only=True)
class World:
    """What is assumed about runs and edits beyond the policy's noise prior.

    ``breadth_sigma`` and ``disagreement`` follow the measured panel of pocket (60 of 120 steps, 22 configurations:
    tau 0.76, veto kills 2% of the better and 69% of the worse); ``shared`` is what equal runs of both sides imply.
    """

    shared: float = 0.5  # share of a difference's variance that is the control's run
    breadth_sigma: float = 1.0  # sigma of a breadth difference over the edit's own confirm sigma_d
    disagreement: float = 1.4  # breadth effect - confirm effect: its standard deviation in typical sigmas


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What is proposed. ``gain``: size of a true gain in typical sigmas, or its mean when ``spread``."""

    name: str
    true_share: float = TRUE_SHARE
    gain: float = 2.0
    harm_share: float = 0.1  # of the proposals that are no gain: these lose
    harm: float = 1.0  # size of a harm over that of a gain
    spread: bool = False  # sizes are exponential, not all equal

    @property
    def words(self) -> str:
        """The mix in words."""
        mean, rest = (" on average" if self.spread else ""), 1.0 - self.true_share
        return (f"{self.true_share:.0%} true gains of {self.gain:g} sigma{mean}, {rest * self.harm_share:.0%} harms of "
                f"{self.gain * self.harm:g} sigma{mean}, {rest * (1.0 - self.harm_share):.0%} without any effect")


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a night may spend, in runs of confirm's length, and what the other runs cost in them."""

    confirm_seconds: float = 180.0
    budget: float = 160.0  # confirm runs: 8 hours at 180 s each
    breadth: float = 0.6  # a breadth run
    short: float = 0.1  # a run of a few steps: two for a preflight, two for each timing pair before a keep
    workers: int = 1  # an idle worker runs the next pair ahead, as the loop does

    def hours(self, runs: float) -> float:
        """Trainer-hours of ``runs`` confirm runs."""
        return runs * self.confirm_seconds / 3600.0


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """[nights, proposals] each: true effect at confirm (positive = gain), at breadth, and the edit's sigma_d; bpb."""

    gain: Floats
    breadth: Floats
    sigma: Floats


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Outcome of many trials of one kind."""

    gain: float  # true, bpb
    p_keep: float
    mc_error: float  # standard error of p_keep
    runs: float  # mean candidate confirm runs
    claimed: float  # mean claimed gain of the kept ones, bpb (0 when none)


class Sums:
    """Values [trials, n] (differences, or runs of one side) as running sums: many policies may judge the same draws.

    Called: an ``Estimate`` of the paired form.
    """

    def __init__(self, values: Floats) -> None:
        self.trials = len(values)
        self.total = np.cumsum(values, axis=1)
        self.square = np.cumsum(values**2, axis=1)

    def __call__(self, live: Flags, n: int) -> tuple[Floats, Floats]:
        mean = self.total[live, n - 1] / n
        return mean, np.maximum(self.square[live, n - 1] - n * mean**2, 0.0)

    def each(self, n: Counts) -> tuple[Floats, Floats]:
        """Mean and sum of squares of every trial at its own ``n``, [trials] each."""
        rows = np.arange(self.trials)
        mean = self.total[rows, n - 1] / n
        return mean, np.maximum(self.square[rows, n - 1] - n * mean**2, 0.0)


class TwoSample:
    """Unpaired runs (an ``Estimate``): ``control`` [trials, controls at the last look], ``candidate`` [trials, n]."""

    def __init__(self, policy: Policy, control: Sums, candidate: Sums) -> None:
        self.trials, self.policy, self.control, self.candidate = candidate.trials, policy, control, candidate

    def __call__(self, live: Flags, n: int) -> tuple[Floats, Floats]:
        mean_c, squares_c = self.control(live, controls_at(self.policy, n))
        mean_x, squares_x = self.candidate(live, n)
        return mean_c - mean_x, squares_c + squares_x


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
    policy: Policy, gain: float | Floats, trials: int, rng: np.random.Generator, *, sigma: float | None = None,
    per_bank: int = 1, shared: float = World.shared,
) -> Floats:
    """[trials, pairs] differences (positive = better). ``per_bank`` consecutive trials share a control bank.

    ``gain``: true, one for all or [trials]. The bank's part of a difference scales with the edit's own sigma.
    """
    pairs, banks = policy.max_pairs, math.ceil(trials / per_bank)
    own = rng.standard_normal((trials, pairs))
    if per_bank > 1:
        bank = np.repeat(rng.standard_normal((banks, pairs)), per_bank, axis=0)[:trials]
        own = math.sqrt(shared) * bank + math.sqrt(1.0 - shared) * own
    return np.reshape(gain, (-1, 1)) + edit_sigmas(policy, trials, rng, sigma)[:, None] * own


def judge(policy: Policy, noise: Noise, differences: Floats | Sums) -> tuple[Flags, Counts]:
    """(kept [trials], candidate runs used [trials]) of the paired design on ``differences`` [trials, pairs].

    The arithmetic of :func:`looks.take`, over arrays; a test holds the two against each other.
    """
    drawn = differences if isinstance(differences, Sums) else Sums(differences)
    return sequential(policy, "paired", noise.sigma_d, min(policy.shrink_df, noise.df), drawn.trials, drawn)


def judge_two_sample(
    policy: Policy, noise: Noise, control: Floats, candidate: Floats,
) -> tuple[Flags, Counts]:
    """The same for unpaired runs: ``control`` [trials, controls at the last look], ``candidate`` [trials, pairs]."""
    drawn = TwoSample(policy, Sums(control), Sums(candidate))
    return sequential(policy, "two-sample", noise.sigma_run, min(policy.shrink_df, noise.run_df), drawn.trials, drawn)


def sequential(
    policy: Policy, form: str, sigma0: float | Floats, df0: float | Floats, trials: int, estimate: Estimate,
) -> tuple[Flags, Counts]:
    """(kept, candidate runs used), [trials] each: every look over arrays.

    ``sigma0``, ``df0``: the pooled scale and its degrees of freedom, one for all or [trials].
    """
    info = tuple(information(policy, n, form) for n in policy.looks)
    z = efficacy(info, policy.alpha, policy.spending)
    last = policy.looks[-1]
    dofs = [n - 1 if form == "paired" else n + controls_at(policy, n) - 2 for n in policy.looks]
    scale, start = np.broadcast_to(sigma0, trials), np.broadcast_to(df0, trials)
    kept, used = np.zeros(trials, dtype=bool), np.zeros(trials, dtype=np.int64)
    live = np.ones(trials, dtype=bool)
    for k, n in enumerate(policy.looks):
        mean, squares = estimate(live, n)
        base = start[live]
        df = base + dofs[k]
        sigma = np.sqrt((base * scale[live] ** 2 + squares) / df)
        keep = mean - _by_df(lambda v, k=k: to_t(z[k], v), df) * sigma / math.sqrt(info[k]) > policy.materiality_bpb
        stop = np.full(len(mean), n == last)
        if n != last and policy.futility_power > 0.0:
            final = _by_df(lambda v: to_t(z[-1], v), base + dofs[-1]) / math.sqrt(info[-1])
            spread = _by_df(lambda v: t_upper(policy.futility_power, v), df) * math.sqrt(1.0 / info[k] - 1.0 / info[-1])
            stop = mean < policy.materiality_bpb + sigma * (final - spread)
        index = np.flatnonzero(live)
        kept[index[keep]] = True
        over = keep | stop
        used[index[over]] = n
        live[index[over]] = False
    return kept, used


def _by_df(quantile: Callable[[float], float], df: Floats) -> Floats:
    """``quantile`` over an array that holds few different values."""
    values, which = np.unique(df, return_inverse=True)
    return np.array([quantile(float(v)) for v in values])[which]


def breadth_passes(policy: Policy, sigma0: float | Floats, df0: float | Floats, differences: Floats) -> Flags:
    """[trials] whether breadth promotes, from its ``differences`` [trials, breadth_pairs].

    The arithmetic of :func:`verdict.breadth_verdict`, over arrays. ``sigma0``: the pooled sigma_d.
    """
    n = differences.shape[1]
    mean = differences.mean(axis=1)
    squares = ((differences - mean[:, None]) ** 2).sum(axis=1)
    se = np.sqrt((df0 * np.square(sigma0) + squares) / (df0 + n - 1) / n)
    return mean >= -policy.breadth_veto_sigmas * se


def reach(
    policy: Policy, gain: float | Floats, *, trials: int = 100_000, seed: int = 0, sigma: float | None = None,
    noise: Noise | None = None, world: World | None = None,
) -> float:
    """P(breadth promotes) at a true confirm gain ``gain`` (one for all or [trials])."""
    rng, noise, world = np.random.default_rng(seed), noise or shipped(policy), world or World()
    effect = gain + world.disagreement * policy.prior.sigma_d * rng.standard_normal(trials)
    own = world.breadth_sigma * edit_sigmas(policy, trials, rng, sigma)
    d = effect[:, None] + own[:, None] * rng.standard_normal((trials, policy.breadth_pairs))
    return float(breadth_passes(policy, noise.sigma_d, min(policy.shrink_df, noise.df), d).mean())


def rates(
    policy: Policy, gain: float, *, trials: int = 100_000, seed: int = 0, sigma: float | None = None,
    noise: Noise | None = None,
) -> Rates:
    """What becomes of ``trials`` independent edits of true gain ``gain`` (each with a bank of its own).

    In the paired form ``sigma`` fixes every edit's sigma_d; in the two-sample form it is the runs' sigma
    (the prior's sigma_run by default), the same for all.
    """
    rng, noise = np.random.default_rng(seed), noise or shipped(policy)
    if form(policy, noise) == "paired":
        d = Sums(draw(policy, gain, trials, rng, sigma=sigma))
        kept, used = judge(policy, noise, d)
        at_stop = d.each(used)[0]
    else:
        s = sigma or policy.prior.sigma_run
        control = s * rng.standard_normal((trials, controls_at(policy, policy.max_pairs)))
        candidate = s * rng.standard_normal((trials, policy.max_pairs)) - gain
        kept, used = judge_two_sample(policy, noise, control, candidate)
        at_stop = Sums(control).each(np.maximum(used, policy.controls))[0] - Sums(candidate).each(used)[0]
    p = float(kept.mean())
    return Rates(gain=gain, p_keep=p, mc_error=math.sqrt(max(p * (1 - p), 1.0 / trials) / trials),
                 runs=float(used.mean()), claimed=float(at_stop[kept].mean()) if kept.any() else 0.0)


def false_share(p_null: float, p_gain: float, true_share: float = TRUE_SHARE) -> float:
    """Share of keeps that are no gain, when ``true_share`` of the proposals are; 0 when nothing is kept."""
    false, true = (1.0 - true_share) * p_null, true_share * p_gain
    return false / (false + true) if false + true > 0.0 else 0.0


def bank_spread(
    policy: Policy, *, banks: int = 2000, per_bank: int = 40, shared: float = World.shared,
    sigma: float | None = None, seed: int = 0, noise: Noise | None = None,
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
    """Error rates and cost of one policy: the figures that a track's targets speak of."""

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


def propose(
    policy: Policy, mix: Mix, costs: Costs, *, nights: int, world: World | None = None, seed: int = 0,
) -> Proposals:
    """As many proposals as the cheapest rule can try in a night."""
    rng, world = np.random.default_rng([seed, 1]), world or World()
    count = math.ceil(costs.budget / min(1.0, policy.breadth_pairs * costs.breadth)) + 1
    shape, sigma = (nights, count), typical_sigma(policy)
    u = rng.random(shape)
    size = mix.gain * sigma * (rng.exponential(size=shape) if mix.spread else np.ones(shape))
    harmful = u > 1.0 - (1.0 - mix.true_share) * mix.harm_share
    gain = np.where(u < mix.true_share, size, np.where(harmful, -mix.harm * size, 0.0))
    breadth = gain + world.disagreement * sigma * rng.standard_normal(shape)
    return Proposals(gain=gain, breadth=breadth, sigma=edit_sigmas(policy, nights * count, rng).reshape(shape))


def breadth_tau(proposals: Proposals, *, sample: int = 1500) -> float:
    """Kendall's tau between true effects at confirm and at breadth, over pairs that differ at confirm."""
    a, b = proposals.gain.ravel()[:sample], proposals.breadth.ravel()[:sample]
    order = np.sign(a[:, None] - a) * np.sign(b[:, None] - b)
    return float(order.sum() / max(1, (a[:, None] != a).sum()))
