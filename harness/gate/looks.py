"""One look: from the figures of n pairs to a bound on the candidate's utility.

Utility U = (control bpb - candidate bpb) - price_mb * (MB more) - price_time * (% slower beyond the dead
band; under ``time_credit`` a gain for % faster beyond it), in bpb, positive = better. Bytes and time enter
as means over the look, so the spread of U is the spread of the bpb differences, and noise and materiality
are each charged once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from harness.gate import noise as noise_mod
from harness.gate.advantage import Advantage
from harness.gate.boundaries import efficacy, t_upper, to_t
from harness.gate.checks import GateError, Sides, Timing, leading, mean_bytes, time_ratio
from harness.gate.noise import Noise
from harness.gate.policy import Policy
from ledger.records import Look, RunFigures


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the figures of one look say, before any boundary."""

    n: int  # candidate runs used
    controls: int  # control runs used
    form: str  # paired | two-sample
    gain: float  # mean control bpb - mean candidate bpb, positive = better
    differences: tuple[float, ...]  # per pair, positive = better; empty in the two-sample form
    delta_bytes: float  # candidate - control, code + artifact
    delta_step_pct: float  # candidate's step time over control's, -100..: % more
    byte_charge: float  # bpb, price_mb * MB more; negative = credit
    time_charge: float  # bpb; negative (a credit) only under ``time_credit``
    sigma: float  # shrunk; of a difference (paired) or of a run (two-sample)
    df: float
    se: float  # of gain

    @property
    def utility(self) -> float:
        """bpb, positive = better."""
        return self.gain - self.byte_charge - self.time_charge


def controls_at(policy: Policy, n: int) -> int:
    """Control runs that the two-sample form uses beside ``n`` candidate runs."""
    return max(n, policy.controls)


def available(policy: Policy, sides: Sides, form: str) -> int:
    """How many candidate runs can be looked at now."""
    return sides.pairs if form == "paired" else leading(sides.candidate)


def ready(policy: Policy, sides: Sides, form: str, n: int) -> bool:
    """Whether the look at ``n`` can be taken. Raises GateError when only controls are missing (two-sample):
    more candidate runs, which "continue" would ask for, could not mend that."""
    if available(policy, sides, form) < n:
        return False
    if form == "two-sample" and len(sides.control) < controls_at(policy, n):
        raise GateError(f"{len(sides.control)} control runs for the two-sample look at {n}; valid: at least "
                        f"{controls_at(policy, n)}: pass the whole control bank, and fill it first")
    return True


def information(policy: Policy, n: int, form: str) -> float:
    """1 / variance of the gain in units of the run's (two-sample) or difference's (paired) variance."""
    if form == "paired":
        return float(n)
    m = controls_at(policy, n)
    return n * m / (n + m)


def _split(
    policy: Policy, sides: Sides, form: str, n: int,
) -> tuple[Sequence[RunFigures], Sequence[RunFigures]]:
    """(control runs, candidate runs) of the look at ``n``."""
    if form == "paired":
        matched = sides.matched(n)
        return [c for c, _ in matched], [x for _, x in matched]
    return beside(sides)[: controls_at(policy, n)], sides.candidate[:n]


def beside(sides: Sides) -> tuple[RunFigures, ...]:
    """Controls in the order in which the two-sample form takes them: from the candidate's first k on, then the rest."""
    first = sides.candidate[0].k
    return tuple(sorted(sides.control, key=lambda r: (r.k < first, r.k)))


def _squares(values: Sequence[float]) -> float:
    mean = fmean(values)
    return math.fsum((v - mean) ** 2 for v in values)


def _time_charge(policy: Policy, slower: float, timing: Timing) -> float:
    """bpb for ``slower`` % more step time. A credit needs its full number of timing pairs, all for the candidate."""
    beyond = max(0.0, slower - policy.time_deadband_pct)
    if policy.time_credit and len(timing) >= policy.timing_pairs > 0 and all(x < c for c, x in timing):
        beyond -= max(0.0, -slower - policy.time_deadband_pct)
    return policy.price_time * beyond


def weigh(policy: Policy, noise: Noise, sides: Sides, form: str, n: int, timing: Timing = ()) -> Evidence:
    """The evidence of the first ``n`` candidate runs; :func:`ready` must hold (breadth: enough pairs)."""
    control, candidate = _split(policy, sides, form, n)
    ctl, cand = [r.val_bpb for r in control], [r.val_bpb for r in candidate]
    if form == "paired":
        diffs = tuple(a - b for a, b in zip(ctl, cand, strict=True))
        gain = fmean(diffs)
        sigma, df = noise_mod.shrink(noise.sigma_d, min(policy.shrink_df, noise.df), _squares(diffs), n - 1)
    else:
        diffs = ()
        gain = fmean(ctl) - fmean(cand)
        sigma, df = noise_mod.shrink(noise.sigma_run, min(policy.shrink_df, noise.run_df),
                                     _squares(ctl) + _squares(cand), len(ctl) + len(cand) - 2)
    delta_bytes = mean_bytes(candidate) - mean_bytes(control)
    slower = 100.0 * (time_ratio(policy, control, candidate, timing) - 1.0)
    return Evidence(
        n=n, controls=len(ctl), form=form, gain=gain, differences=diffs, delta_bytes=delta_bytes,
        delta_step_pct=slower, byte_charge=policy.price_mb * delta_bytes / 1e6,
        time_charge=_time_charge(policy, slower, timing),
        sigma=sigma, df=df, se=sigma / math.sqrt(information(policy, n, form)),
    )


def take(policy: Policy, evidence: Evidence, index: int, advantage: Advantage | None = None) -> Look:
    """Look ``index`` (0-based) with its boundary, futility line and decision.

    Keep: utility - boundary * se > materiality; or, with an ``advantage`` (cheaper, faster, simpler),
    gain - boundary * se > -noninferiority. The same boundaries serve both: each null hypothesis has its own
    alpha, and the second lies inside the first, so that testing both costs neither anything.

    Reject: at the last look, or when the predictive chance of a keep at the last look is under
    ``futility_power``. Given the data so far and a flat prior on the gain, the final mean is Student t around
    the present mean with variance sigma^2 (1/I_k - 1/I_K); the final threshold is taken at the present sigma.
    ``Look.futility`` is the utility at which that chance equals ``futility_power``; at the last look it is the
    threshold itself.
    """
    info = tuple(information(policy, n, evidence.form) for n in policy.looks)
    z = efficacy(info, policy.alpha, policy.spending)
    boundary = to_t(z[index], evidence.df)
    lower = evidence.utility - boundary * evidence.se
    last = index == len(info) - 1
    final_df = evidence.df + (0.0 if last else _later_df(policy, evidence, info, index))
    threshold = policy.materiality_bpb + to_t(z[-1], final_df) * evidence.sigma / math.sqrt(info[-1])
    futility = threshold
    if not last and policy.futility_power > 0.0:
        spread = evidence.sigma * math.sqrt(1.0 / info[index] - 1.0 / info[-1])
        futility = threshold - t_upper(policy.futility_power, evidence.df) * spread
    stop = last or (policy.futility_power > 0.0 and evidence.utility < futility)
    keep = lower > policy.materiality_bpb
    if advantage and advantage.worth(evidence.utility):
        keep = keep or evidence.gain - boundary * evidence.se > -policy.noninferiority_bpb
        # the easier of the two aims decides whether it is worth going on
        easier = futility - policy.materiality_bpb - policy.noninferiority_bpb
        stop = last or (stop and evidence.gain < easier)
    return Look(n=evidence.n, mean=evidence.utility, se=evidence.se, sigma=evidence.sigma, df=evidence.df,
                boundary=boundary, futility=futility, lower=lower,
                decision="keep" if keep else "reject" if stop else "continue")


def _later_df(policy: Policy, evidence: Evidence, info: tuple[float, ...], index: int) -> float:
    """Degrees of freedom that the remaining looks will add."""
    more = policy.looks[-1] - policy.looks[index]
    if evidence.form == "paired":
        return float(more)
    return float(more + controls_at(policy, policy.looks[-1]) - controls_at(policy, policy.looks[index]))
