"""Whole nights by simulation: the gate beside the field's usual rules, on the same proposals, for the same time.

A night is a budget of trainer time. A trial that has begun when it ends is finished, and its overrun counts.
Every run is charged: the gate's preflight, breadth, confirm and control runs, the timing pairs before a keep, the
fresh controls after it and the fresh pairs of its honest re-measurement; a rival's one run per proposal and one for
its baseline. Left out: what a keep may rest on beside its gain, and controls that idle workers make.

A run of configuration c scores truth(c) + luck. On fresh seeds luck has the track's sigma_run. On one fixed seed
the seed's own part is common to all runs and only the configuration's part is left, of variance sigma_d^2 / 2:
two of them differ by sigma_d. The gate's paired differences have the edit's own sigma_d, half of the variance
from the control, which all trials against one bank share (``simulate.World.shared``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from harness.gate.looks import controls_at
from harness.gate.noise import form, shipped
from harness.gate.policy import Policy
from harness.gate.simulate import (
    Costs,
    Counts,
    Flags,
    Floats,
    Proposals,
    Sums,
    TwoSample,
    World,
    breadth_passes,
    sequential,
)

LIKELY_REAL = 2.0  # pi-autoresearch: confidence from which an improvement is called "likely real"
ENOUGH_RESULTS = 3  # pi-autoresearch: fewer results have no confidence
STEPS = 40  # points of a night at which progress is noted


TOTALS = (
    "runs",  # trainer time, in confirm runs
    "trials",
    "confirm_runs", "confirm_runs_true",  # candidate runs of confirm: of all trials, of true gains
    "true", "reached", "kept_true",  # true gains tried, that reached confirm, that were kept
    "keeps", "false", "harms",  # verdicts: kept; kept with a true gain <= 0; kept with one < 0
    "reverted", "reverted_true",  # keeps taken back
    "gain", "claim", "honest",  # of the keeps that stand, bpb: true, as selected, on fresh pairs
)


@dataclass
class Nights:
    """What one rule made of its nights. ``totals``: per night, [nights] each (``TOTALS``)."""

    rule: str
    nights: int
    measures_again: bool = False  # keeps are measured on fresh runs: there is an honest claim
    totals: dict[str, Floats] = field(init=False)
    progress: Floats = field(init=False)  # [STEPS, 2] mean true and claimed gain reached in each slice of the budget

    def __post_init__(self) -> None:
        self.totals = {name: np.zeros(self.nights) for name in TOTALS}
        self.progress = np.zeros((STEPS, 2))

    def note(self, share: Floats, true: Floats, claimed: Floats) -> None:
        """Gains that came to stand at ``share`` of the budget, [n] each. Past the end they are not drawn."""
        at = np.minimum((share * STEPS).astype(int), STEPS)
        for column, value in enumerate((true, claimed)):
            self.progress[:, column] += np.bincount(at, value, STEPS + 1)[:STEPS] / self.nights


@dataclass(frozen=True)
class Figure:
    """A mean or a ratio over nights, with its Monte Carlo standard error."""

    value: float
    error: float


def _ratio(above: Floats, below: Floats | float) -> Figure:
    """sum / sum over nights; standard error by linearisation. No nights with anything below: 0."""
    under = np.broadcast_to(np.asarray(below, dtype=float), above.shape)
    total = float(under.sum())
    if total <= 0.0:
        return Figure(0.0, 0.0)
    value = float(above.sum()) / total
    return Figure(value, math.sqrt(float(((above - value * under) ** 2).sum())) / total)


def figures(nights: Nights, sigma: float, costs: Costs) -> dict[str, Figure]:
    """Everything that is reported of a rule. Claims and gains in ``sigma`` (bpb), time in trainer-hours.

    Trials, keeps and gain are per night of exactly the budget: a night's overrun is divided out.
    """
    t = nights.totals
    night = t["runs"] / costs.budget
    hours = t["runs"] * costs.hours(1.0)
    stand = t["keeps"] - t["reverted"]
    honest = (t["honest"] - t["gain"]) / sigma
    again = {"reverted": _ratio(t["reverted"], t["keeps"]), "overclaim_honest": _ratio(honest, 1.0),
             "overclaim_honest_per_keep": _ratio(honest, stand)} if nights.measures_again else {}
    return {
        "trials": _ratio(t["trials"], night),
        "keeps": _ratio(t["keeps"], night),
        "false_share": _ratio(t["false"], t["keeps"]),
        "harm_share": _ratio(t["harms"], t["keeps"]),
        "standing_false_share": _ratio(t["false"] - t["reverted"] + t["reverted_true"], stand),
        "p_keep_reached": _ratio(t["kept_true"], t["reached"]),
        "p_keep": _ratio(t["kept_true"], t["true"]),
        "breadth_losses": _ratio(t["true"] - t["reached"], t["true"] - t["kept_true"]),
        "runs_per_trial": _ratio(t["confirm_runs"], t["trials"]),
        "runs_per_true": _ratio(t["confirm_runs_true"], t["reached"]),
        "overclaim": _ratio((t["claim"] - t["gain"]) / sigma, 1.0),
        "overclaim_per_keep": _ratio((t["claim"] - t["gain"]) / sigma, stand),
        "gain": _ratio(t["gain"] / sigma, night),
        "gain_per_hour": _ratio(t["gain"] / sigma, hours),
        **again,
    }


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One run per proposal; the score that won is inherited by the next comparison.

    ``kind`` lower: kept when below the best so far (karpathy/autoresearch, program.md: "if val_bpb improved (lower),
    you advance the branch"). best-mad: and when, counting it as kept, |best kept - first result| / MAD of all results
    so far is at least 2, never before the third result (pi-autoresearch, computeConfidence; there the figure only
    advises, this is its strict reading). threshold: below the best by more than ``threshold`` bpb.
    """

    name: str
    kind: str
    one_seed: bool = False
    threshold: float = 0.0


def rules(threshold: float) -> tuple[Rule, ...]:
    """The rivals, on fresh seeds and on one fixed seed each."""
    return tuple(
        Rule(name=f"{name}, {'one seed' if one else 'fresh seeds'}", kind=kind, one_seed=one, threshold=threshold)
        for kind, name in (("lower", "keep if lower"), ("best-mad", "best/MAD >= 2"),
                           ("threshold", f"lower by {threshold:g}"))
        for one in (False, True))


def play(rule: Rule, gain: Floats, luck: Floats) -> tuple[Flags, Floats]:
    """(kept, claimed), [nights, proposals] each: ``rule`` on true gains [nights, proposals] in their order.

    ``luck`` [nights, 1 + proposals]: of the baseline, then of each proposal's run; bpb, positive = scores worse.
    ``claimed``: by how much a kept score is below the one that it replaces, else 0.
    """
    kept, claimed = np.zeros(gain.shape, dtype=bool), np.zeros(gain.shape)
    truth, best = np.zeros(len(gain)), luck[:, 0].copy()
    scores = np.empty(luck.shape)
    scores[:, 0] = best
    for i in range(gain.shape[1]):
        seen = truth - gain[:, i] + luck[:, i + 1]
        scores[:, i + 1] = seen
        keep = best - seen > (rule.threshold if rule.kind == "threshold" else 0.0)
        if rule.kind == "best-mad":
            keep &= _confident(scores[:, : i + 2], keep)
        kept[:, i], claimed[:, i] = keep, np.where(keep, best - seen, 0.0)
        truth, best = np.where(keep, truth - gain[:, i], truth), np.where(keep, seen, best)
    return kept, claimed


def _confident(scores: Floats, ask: Flags) -> Flags:
    """[nights] whether the last score, were it kept, makes the session's confidence "likely real"."""
    out = np.zeros(len(scores), dtype=bool)
    if scores.shape[1] < ENOUGH_RESULTS or not ask.any():
        return out
    s = scores[ask]
    mad = np.median(np.abs(s - np.median(s, axis=1, keepdims=True)), axis=1)
    out[ask] = (mad > 0.0) & (np.abs(s[:, -1] - s[:, 0]) >= LIKELY_REAL * mad)
    return out


def rival_nights(policy: Policy, proposals: Proposals, costs: Costs, rule: Rule, *, seed: int = 0) -> Nights:
    """The nights of a one-run rule. Rules of one seed number share their luck, run by run."""
    nights, tried = len(proposals.gain), min(proposals.gain.shape[1], max(0, math.floor(costs.budget) - 1))
    gain = proposals.gain[:, :tried]
    z = np.random.default_rng([seed, 2]).standard_normal((nights, tried + 1))
    scale = policy.prior.sigma_run
    if rule.one_seed:
        base = np.full((nights, 1), policy.prior.sigma_d)
        scale = np.hstack([base, proposals.sigma[:, :tried]]) / math.sqrt(2.0)
    kept, claimed = play(rule, gain, scale * z)
    out, true = Nights(rule.name, nights), gain > 0.0
    t = out.totals
    t["runs"] += tried + 1
    t["trials"] += tried
    t["confirm_runs"] += tried
    for name, value in (("true", true), ("reached", true), ("confirm_runs_true", true), ("kept_true", kept & true),
                        ("keeps", kept), ("false", kept & ~true), ("harms", kept & (gain < 0.0)),
                        ("gain", kept * gain), ("claim", claimed)):
        t[name] += value.sum(axis=1)
    share = np.broadcast_to((np.arange(tried) + 2.0) / costs.budget, gain.shape)
    out.note(share[kept], gain[kept], claimed[kept])
    return out


def gate_nights(
    policy: Policy, proposals: Proposals, costs: Costs, *, world: World | None = None, seed: int = 0,
) -> Nights:
    """The gate's nights under ``policy``: breadth's veto, confirm, fresh controls and re-measurement after a keep."""
    nights, count = proposals.gain.shape
    rng, sizes = np.random.default_rng([seed, 3]), Sizes.of(policy)
    gate = _Gate(policy, proposals, costs, world or World(), sizes.draw(rng, nights))
    for i in range(count):
        if not gate.trial(i, sizes.draw(rng, nights)):
            break
    return gate.finish(rng.standard_normal((nights, 2)))


@dataclass(frozen=True)
class Luck:
    """Standard normals for every night's next proposal; positive favours the candidate."""

    breadth: Floats  # [nights, breadth pairs], the candidate's runs
    confirm: Floats  # [nights, pairs], the candidate's runs
    parent: Floats  # [nights, width], the parent's runs of an honest re-measurement
    bank: Floats  # [nights, width], runs of the incumbent that a keep makes
    breadth_bank: Floats  # [nights, breadth pairs], likewise


@dataclass(frozen=True)
class Sizes:
    """How much luck a trial under one policy needs."""

    breadth: int
    pairs: int
    width: int  # controls of a look, or fresh pairs of a re-measurement if those are more

    @classmethod
    def of(cls, policy: Policy) -> Sizes:
        width = max(controls_at(policy, policy.max_pairs), policy.honest_pairs + policy.honest_extend)
        return cls(policy.breadth_pairs, policy.max_pairs, width)

    def draw(self, rng: np.random.Generator, nights: int) -> Luck:
        """The next proposal's luck, drawn for every night whether it is still on or not."""
        sizes = (self.breadth, self.pairs, self.width, self.width, self.breadth)
        return Luck(*(rng.standard_normal((nights, size)) for size in sizes))


class _Gate:
    """All nights at once, one proposal after the other. Arrays are [nights] unless they say otherwise."""

    def __init__(self, policy: Policy, proposals: Proposals, costs: Costs, world: World, first: Luck) -> None:
        self.policy, self.proposals, self.costs, self.world = policy, proposals, costs, world
        nights = len(proposals.gain)
        self.form = form(policy, shipped(policy))  # kept: the pool moves the scale, here not the form
        self.out = Nights("gate", nights, measures_again=True)
        self.bank, self.breadth_bank = first.bank.copy(), first.breadth_bank.copy()
        self.made = np.full(nights, policy.controls)  # controls there are
        self.out.totals["runs"] += policy.controls
        self.breadth_ready = np.zeros(nights, dtype=bool)
        prior = policy.prior
        self.base = {"d": prior.sigma_d * prior.inflation, "run": prior.sigma_run * prior.inflation}
        self.sums = {name: np.full(nights, prior.df * base**2) for name, base in self.base.items()}
        self.df = np.full(nights, prior.df)  # of both pools: trials add the same to each

    def scale(self, on: Counts, pool: str) -> tuple[Floats, Floats]:
        """(sigma, degrees of freedom that shrinking gives it) of a pool, for the nights ``on``."""
        df = np.minimum(self.df[on], self.policy.pool_df_cap)
        return np.sqrt(self.sums[pool][on] / self.df[on]), np.minimum(self.policy.shrink_df, df)

    def trial(self, i: int, luck: Luck) -> bool:
        """Proposal ``i`` in every night that is still on; False when none is."""
        t = self.out.totals
        on = np.flatnonzero(t["runs"] < self.costs.budget)
        if not len(on):
            return False
        true = self.proposals.gain[on, i] > 0.0
        go = on[self.breadth(on, i, luck)]
        t["trials"][on] += 1
        t["true"][on] += true
        t["reached"][go] += self.proposals.gain[go, i] > 0.0
        if len(go):
            self.confirm(go, i, luck)
        return True

    def breadth(self, on: Counts, i: int, luck: Luck) -> Flags:
        """[on] whether breadth promotes."""
        p, w, shared = self.proposals, self.world, self.world.shared
        cost = self.policy.breadth_pairs * self.costs.breadth
        self.out.totals["runs"][on] += 2.0 * self.costs.short + cost * np.where(self.breadth_ready[on], 1.0, 2.0)
        self.breadth_ready[on] = True
        z = math.sqrt(shared) * self.breadth_bank[on] + math.sqrt(1.0 - shared) * luck.breadth[on]
        d = p.breadth[on, i][:, None] + w.breadth_sigma * p.sigma[on, i][:, None] * z
        sigma, df = self.scale(on, "d")
        return breadth_passes(self.policy, sigma, df, d)

    def confirm(self, go: Counts, i: int, luck: Luck) -> None:
        """The looks, their cost, the pool, and what follows a keep."""
        policy, t, p = self.policy, self.out.totals, self.proposals
        drawn, differences, runs = self.runs(go, i, luck)
        paired = self.form == "paired"
        kept, used = sequential(policy, self.form, *self.scale(go, "d" if paired else "run"), len(go), drawn)
        ahead = -(-used // self.costs.workers) * self.costs.workers
        made = np.minimum(ahead, policy.max_pairs)
        wanted = np.maximum(made, policy.controls)
        t["runs"][go] += made + np.maximum(0, wanted - self.made[go])
        t["runs"][go[kept]] += 2.0 * policy.timing_pairs * self.costs.short
        self.made[go] = np.maximum(self.made[go], wanted)
        gain = p.gain[go, i]
        t["confirm_runs"][go] += made
        t["confirm_runs_true"][go] += made * (gain > 0.0)
        self.learn(go, made, differences, runs)
        for name, value in (("keeps", kept), ("kept_true", kept & (gain > 0.0)), ("false", kept & (gain <= 0.0)),
                            ("harms", kept & (gain < 0.0))):
            t[name][go] += value
        if kept.any():
            at_stop = differences.each(used)[0] if paired else (
                runs[0].each(np.maximum(used, policy.controls))[0] - runs[1].each(used)[0])
            self.keep(go[kept], i, luck, at_stop[kept])

    def runs(self, go: Counts, i: int, luck: Luck) -> tuple[Sums | TwoSample, Sums, tuple[Sums, ...]]:
        """(what the looks judge, same-seed differences, runs of both sides when unpaired) of one trial each."""
        policy, shared, bank = self.policy, self.world.shared, self.bank[go]
        gain, own = self.proposals.gain[go, i][:, None], luck.confirm[go]
        pairs = policy.max_pairs
        if self.form == "paired":
            z = math.sqrt(shared) * bank[:, :pairs] + math.sqrt(1.0 - shared) * own
            d = Sums(gain + self.proposals.sigma[go, i][:, None] * z)
            return d, d, ()
        s = policy.prior.sigma_run
        control, candidate = s * bank[:, : controls_at(policy, pairs)], -s * own - gain
        both = TwoSample(policy, Sums(control), Sums(candidate))
        return both, Sums(control[:, :pairs] - candidate), (both.control, both.candidate)

    def learn(self, go: Counts, made: Counts, differences: Sums, runs: tuple[Sums, ...]) -> None:
        """The pool takes in a trial, as ``noise.pool`` does."""
        dof = made - 1
        squares = {"d": differences.each(made)[1]}
        if runs:
            squares["run"] = (runs[0].each(made)[1] + runs[1].each(made)[1]) / 2.0
        for name, value in squares.items():
            limit = dof * (self.policy.pool_clip * self.base[name]) ** 2
            self.sums[name][go] += np.minimum(value, limit)
        self.df[go] += dof

    def keep(self, kept: Counts, i: int, luck: Luck, claim: Floats) -> None:
        """A new incumbent: fresh controls, measured again against its parent; taken back when that says no gain."""
        policy, t, shared = self.policy, self.out.totals, self.world.shared
        gain, sigma = self.proposals.gain[kept, i], self.proposals.sigma[kept, i][:, None]
        self.bank[kept], self.breadth_bank[kept] = luck.bank[kept], luck.breadth_bank[kept]
        self.breadth_ready[kept] = False
        first, both = policy.honest_pairs, policy.honest_pairs + policy.honest_extend
        pairs = np.full(len(kept), first)
        honest, back = np.zeros(len(kept)), np.zeros(len(kept), dtype=bool)
        if first:
            z = math.sqrt(shared) * luck.parent[kept] - math.sqrt(1.0 - shared) * luck.bank[kept]
            fresh = Sums(gain[:, None] + sigma * z)
            pairs = np.where(fresh.total[:, first - 1] < 0.0, both, first)
            honest = fresh.each(pairs)[0]
            back = honest < 0.0
            # the parent is the incumbent again, measured already on the fresh seeds
            self.bank[kept[back]] = luck.parent[kept[back]]
        controls = np.maximum(policy.controls, pairs)
        t["runs"][kept] += controls + pairs + back * np.maximum(0, policy.controls - pairs)
        self.made[kept] = controls
        t["reverted"][kept] += back
        t["reverted_true"][kept] += back & (gain > 0.0)
        for name, value in (("gain", gain), ("claim", claim), ("honest", honest)):
            t[name][kept] += np.where(back, 0.0, value)
        self.out.note(t["runs"][kept][~back] / self.costs.budget, gain[~back], (honest if first else claim)[~back])

    def finish(self, z: Floats) -> Nights:
        """Without fresh pairs, what is honest is fresh controls of the last incumbent against those of the first."""
        if not self.policy.honest_pairs:
            t = self.out.totals
            spread = self.policy.prior.sigma_run / math.sqrt(self.policy.controls)
            t["honest"] += t["gain"] + np.where(t["keeps"] > 0, spread * (z[:, 0] - z[:, 1]), 0.0)
        return self.out
