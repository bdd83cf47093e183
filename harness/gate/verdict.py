"""Verdicts: pure functions from figures to keep, reject, or measure more.

``breadth_verdict`` may only veto. ``confirm_step`` is called after every confirm run and answers with a
``Decided``; one whose verdict is "continue" says in ``needed_pairs`` how many pairs the next look wants
and is never written to the ledger. ``recompute`` judges a recorded verdict again from its own figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from msgspec import structs

from harness.gate import explain
from harness.gate import noise as noise_mod
from harness.gate.advantage import Advantage, advantage
from harness.gate.boundaries import t_upper
from harness.gate.checks import (
    Converged,
    GateError,
    Sides,
    Timing,
    check_bytes,
    check_converged,
    check_runtime,
    check_timing,
    prepare,
)
from harness.gate.early import EarlyStop, stops
from harness.gate.looks import Evidence, available, beside, controls_at, ready, take, weigh
from harness.gate.noise import Noise
from harness.gate.policy import Policy, from_dict, hash_of
from ledger.records import Decided, Look, RunFigures, SubCheck


@dataclass(frozen=True, kw_only=True)
class BreadthVerdict:
    """Breadth's answer. Differences on the dev slice, bpb, positive = candidate better."""

    decision: Literal["continue", "promote", "veto"]
    explanation: str
    needed_pairs: int  # pairs wanted before breadth can judge, 0 once it has
    n: int = 0
    mean: float = 0.0
    se: float = 0.0
    sigma: float = 0.0
    df: float = 0.0
    threshold: float = 0.0  # veto when mean lies below it (a negative number)
    decided: Decided | None = None  # the record of a veto


def breadth_verdict(
    policy: Policy, control: Sequence[RunFigures], candidate: Sequence[RunFigures], noise: Noise,
    *, cost_seconds: float = 0.0,
) -> BreadthVerdict:
    """Veto only when worse by more than ``breadth_veto_sigmas`` standard errors of the mean difference.

    A short run predicts a long one poorly, so breadth never promotes on merit: it stops what is plainly
    bad. Paired always (both sides run the same seeds, and the scale of a difference covers what pairing
    does not remove). Raises GateError when the figures must not be compared.
    """
    sides = _trim(policy, prepare(control, candidate), "paired")
    n = policy.breadth_pairs
    if sides.pairs < n:
        return BreadthVerdict(decision="continue", needed_pairs=n,
                              explanation=f"breadth has {sides.pairs} of {n} pairs")
    evidence = weigh(policy, noise, sides, "paired", n)
    threshold = -policy.breadth_veto_sigmas * evidence.se
    veto = evidence.gain < threshold
    text = explain.breadth(policy, evidence, threshold, veto)
    decided = None
    if veto:
        decided = _record(policy, sides, noise, evidence, "reject", "rejected.worse", text, stage="breadth",
                          facts=Facts(cap_bytes=0, cost_seconds=cost_seconds))
    return BreadthVerdict(
        decision="veto" if veto else "promote", explanation=text, needed_pairs=0, n=n, mean=evidence.gain,
        se=evidence.se, sigma=evidence.sigma, df=evidence.df, threshold=threshold, decided=decided)


def early_verdict(
    policy: Policy, control: Sequence[RunFigures], early: EarlyStop, noise: Noise, *, cost_seconds: float = 0.0,
) -> Decided | None:
    """The record of a breadth run given up on its way; None when the policy would not have given it up.

    ``control``: the incumbent's run of the same k and seed, with its dev losses, and no other.
    """
    again = stops(policy, control[0], early.step, early.of, early.candidate) if len(control) == 1 else None
    if again is None:
        return None
    sides = Sides(control=tuple(control), candidate=(), pairs=0)
    return _record(policy, sides, noise, None, "reject", "rejected.worse", explain.early(policy, again),
                   stage="breadth", facts=Facts(cap_bytes=0, cost_seconds=cost_seconds), early=again)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the gate is told beside the runs' figures; all of it goes into the record."""

    cap_bytes: int
    timing: Timing = ()  # step ms of (control, candidate), taking turns
    simpler: int = 0  # settings that the candidate has fewer than the incumbent
    converged: Converged | None = None
    cost_seconds: float = 0.0


def confirm_step(
    policy: Policy, control: Sequence[RunFigures], candidate: Sequence[RunFigures], noise: Noise, facts: Facts,
) -> Decided:
    """Judge what has been measured so far.

    Hard limits first: bytes at once, on every candidate run; step time as soon as a look can be taken.
    Then the looks in order, as far as there are runs. The answer's verdict is keep, reject or continue; a
    continue names what is wanted, ``needed_pairs`` (for the next look) or ``needed_timing`` (a keep or a
    rejection for time rests on runs that took turns). ``delta_bpb`` is candidate minus control (negative is
    better), ``Look.mean`` is the utility (positive is better). Raises GateError when the figures must not be
    compared (other evaluator, data, slice, seeds or code tree, a run twice, a non-finite figure).
    """
    form = noise_mod.form(policy, noise)
    check_timing(facts.timing)
    sides = _trim(policy, prepare(control, candidate), form)
    checks = [_comparable(sides), check_bytes(policy, sides.candidate, facts.cap_bytes)]
    if facts.converged:
        checks.append(check_converged(sides.candidate, facts.converged))
    out = _Recorder(policy, sides, noise, facts, checks)
    if not all(c.passed for c in checks):
        broken = next(c for c in checks if not c.passed)
        return out.record(None, "reject", "rejected.bytes", explain.limit(policy, broken))
    evidence: Evidence | None = None
    plus: Advantage | None = None
    for index, n in enumerate(policy.looks):
        if not ready(policy, sides, form, n):
            text = explain.waiting(policy, available(policy, sides, form), n, out.looks)
            return out.record(evidence, "continue", "continue", text, needed_pairs=n)
        evidence = weigh(policy, noise, sides, form, n, facts.timing)
        if index == 0:
            checks.append(_runtime(policy, sides, form, facts.timing))
            if not checks[-1].passed:
                return out.timed(evidence, "reject", "rejected.runtime", explain.limit(policy, checks[-1]))
        plus = advantage(policy, evidence.delta_bytes, evidence.delta_step_pct, facts.cap_bytes, facts.timing,
                         facts.simpler)
        look = take(policy, evidence, index, plus)
        if look.decision == "keep" and not _affordable(policy, evidence, look):
            look = _refuse(look, last=index == len(policy.looks) - 1)
        out.looks.append(look)
        if look.decision != "continue":
            break
    assert evidence is not None  # a policy has at least one look
    verdict, reason = _reason(policy, sides, evidence, out.looks[-1], plus)
    text = explain.outcome(policy, noise, evidence, out.looks, reason, plus)
    return out.timed(evidence, verdict, reason, text)


@dataclass
class _Recorder:
    """Makes the record of a confirm verdict from what all of them share."""

    policy: Policy
    sides: Sides
    noise: Noise
    facts: Facts
    checks: list[SubCheck]
    looks: list[Look] = field(default_factory=list)

    def record(
        self, evidence: Evidence | None, verdict: str, reason: str, text: str, *, needed_pairs: int = 0,
        needed_timing: int = 0,
    ) -> Decided:
        return _record(self.policy, self.sides, self.noise, evidence, verdict, reason, text, facts=self.facts,
                       looks=self.looks, checks=self.checks, needed_pairs=needed_pairs, needed_timing=needed_timing)

    def timed(self, evidence: Evidence, verdict: str, reason: str, text: str) -> Decided:
        """The verdict, or a request for timing when it may depend on time and that was not measured in turns.

        It may for a keep, for a charge that a rejection rests on, and for a candidate that seems much faster.
        """
        wanted, p, more = self.policy.timing_pairs, self.policy, evidence.delta_step_pct
        by_time = (verdict == "keep" or reason == "rejected.runtime" or evidence.time_charge > 0.0
                   or (p.faster_pct > 0.0 and more <= -p.faster_pct) or (p.time_credit and more < -p.time_deadband_pct))
        if len(self.facts.timing) < wanted and by_time:
            return self.record(evidence, "continue", "continue", explain.untimed(self.policy, reason, wanted),
                               needed_timing=wanted)
        return self.record(evidence, verdict, reason, text)


def _comparable(sides: Sides) -> SubCheck:
    """States what :func:`prepare` has enforced (it raises otherwise)."""
    run = sides.candidate[0]
    return SubCheck(
        name="comparable", passed=True,
        detail=f"{len(sides.control)} control and {len(sides.candidate)} candidate runs, all finite, of one "
               f"evaluator ({run.evaluator_hash[:12]}), one data set ({run.data_fingerprint[:12]}), "
               f"split {run.split}, {run.eval_tokens} tokens; pairs share their seeds")


def _runtime(policy: Policy, sides: Sides, form: str, timing: Timing) -> SubCheck:
    """Step times over every pair there is (two-sample: over all runs), unless runs took turns."""
    if form == "paired":
        matched = sides.matched(sides.pairs)
        return check_runtime(policy, [c for c, _ in matched], [x for _, x in matched], timing)
    return check_runtime(policy, sides.control, sides.candidate, timing)


def _affordable(policy: Policy, evidence: Evidence, look: Look) -> bool:
    """A keep that rests on fewer bytes or less time must not have lost bpb: its lower bound stays inside the margin."""
    return (_gained(policy, evidence, look)
            or evidence.gain - look.boundary * evidence.se > -policy.noninferiority_bpb)


def _gained(policy: Policy, evidence: Evidence, look: Look) -> bool:
    """Whether the score alone carries the keep, without any credit: by the same bound."""
    charges = max(0.0, evidence.time_charge) + max(0.0, evidence.byte_charge)
    return evidence.gain - look.boundary * evidence.se - charges > policy.materiality_bpb


def _refuse(look: Look, *, last: bool) -> Look:
    """The same look without its keep."""
    return structs.replace(look, decision="reject" if last else "continue")


def _reason(
    policy: Policy, sides: Sides, evidence: Evidence, look: Look, plus: Advantage | None,
) -> tuple[str, str]:
    """(verdict, reason code) of the look that ended the trial."""
    if look.decision == "keep":
        if look.lower <= policy.materiality_bpb:
            assert plus is not None  # nothing else lets a look keep
            return "keep", plus.reason
        if _gained(policy, evidence, look):
            return "keep", "kept.gain"
        return "keep", "kept.faster" if -evidence.time_charge > -evidence.byte_charge else "kept.cheaper"
    t = t_upper(policy.worse_alpha, evidence.df)
    upper = look.mean + t * look.se
    if upper < 0.0 or evidence.gain + t * evidence.se < 0.0:
        return "reject", "rejected.worse"
    pairs = sides.matched(evidence.n) if evidence.form == "paired" else []
    unchanged = bool(pairs) and all(c.artifact_sha256 == x.artifact_sha256 != "" for c, x in pairs)
    proven_small = look.lower > 0.0 and look.mean <= policy.materiality_bpb
    if unchanged or upper < policy.materiality_bpb or proven_small:
        return "reject", "rejected.immaterial"
    return "reject", "rejected.noise"


def _trim(policy: Policy, sides: Sides, form: str) -> Sides:
    """Without the controls that no look uses, so that the record holds what the verdict rests on."""
    if form == "paired":
        wanted = {r.k for r in sides.candidate}
        control = tuple(r for r in sides.control if r.k in wanted)
        control = control or sides.control[:1]  # bytes may be judged before any pair is complete
    else:
        control = beside(sides)[: controls_at(policy, policy.max_pairs)]
    return Sides(control=control, candidate=sides.candidate, pairs=sides.pairs)


def _record(
    policy: Policy, sides: Sides, noise: Noise, evidence: Evidence | None, verdict: str, reason: str,
    explanation: str, *, facts: Facts, stage: str = "confirm", looks: Sequence[Look] = (),
    checks: Sequence[SubCheck] = (), needed_pairs: int = 0, needed_timing: int = 0, early: EarlyStop | None = None,
) -> Decided:
    """The record of a verdict, with the figures it rests on and no others."""
    converged = facts.converged
    return Decided(
        verdict=verdict, reason=reason, explanation=explanation, policy_hash=policy.hash,
        policy=policy.to_dict(), stage=stage, control=list(sides.control), candidate=list(sides.candidate),
        noise_prior=noise.to_dict(), looks=list(looks), checks=list(checks),
        delta_bpb=None if evidence is None else -evidence.gain,
        delta_bytes=None if evidence is None else round(evidence.delta_bytes),
        delta_step_pct=None if evidence is None else evidence.delta_step_pct,
        sigma=None if evidence is None else evidence.sigma,
        sigma_df=None if evidence is None else evidence.df,
        cost_seconds=facts.cost_seconds, cap_bytes=facts.cap_bytes, timing=[list(map(float, p)) for p in facts.timing],
        simpler=facts.simpler, converged_ratio=converged.ratio if converged else 0.0,
        converged_cap_bytes=converged.cap_bytes if converged else 0, early=early,
        needed_pairs=needed_pairs, needed_timing=needed_timing)


def facts_of(decided: Decided) -> Facts:
    """The facts that a recorded confirm verdict was given."""
    ratio, cap = decided.converged_ratio, decided.converged_cap_bytes
    return Facts(cap_bytes=decided.cap_bytes, timing=decided.timing, simpler=decided.simpler,
                 converged=Converged(ratio=ratio, cap_bytes=cap) if ratio else None, cost_seconds=decided.cost_seconds)


def recompute(decided: Decided) -> list[str]:
    """Judge a recorded verdict again from its own figures; what does not agree, one line each.

    [] = reproduced. Compared: policy hash, verdict, reason, every look, every check's outcome, deltas and
    sigma. Words (explanation, details) are not: their wording may improve; the ledger's hash chain
    guards them. Figures that no verdict depends on (peak memory, say) are the chain's business too.
    """
    if hash_of(decided.policy) != decided.policy_hash:
        return [f"policy_hash {decided.policy_hash} is not the hash of the recorded policy"]
    if decided.verdict not in ("keep", "reject"):
        return [f"verdict {decided.verdict!r}; valid in a ledger: keep, reject"]
    if decided.stage == "preflight":
        return [] if decided.verdict == "reject" else ["preflight cannot keep"]
    try:
        policy = from_dict(decided.policy)
        noise = noise_mod.noise_from_dict(decided.noise_prior)
        if decided.early is not None:
            again = early_verdict(policy, decided.control, decided.early, noise)
        elif decided.stage == "breadth":
            again = breadth_verdict(policy, decided.control, decided.candidate, noise).decided
        elif decided.stage == "confirm":
            again = confirm_step(policy, decided.control, decided.candidate, noise, facts_of(decided))
        else:
            return [f"stage {decided.stage!r}; valid: preflight, breadth, confirm"]
    except ValueError as e:  # GateError, PolicyError, NoiseError: the figures themselves are impossible
        return [f"cannot be judged again: {e}"]
    if again is None:
        return ["these figures end no breadth"]
    return _differences(decided, again)


def _differences(old: Decided, new: Decided) -> list[str]:
    """Where two verdicts on the same figures differ."""
    out = [f"{name}: recorded {getattr(old, name)!r}, recomputed {getattr(new, name)!r}"
           for name in ("verdict", "reason", "delta_bytes", "needed_pairs", "needed_timing", "cap_bytes", "early")
           if getattr(old, name) != getattr(new, name)]
    out += [f"{name}: recorded {getattr(old, name)!r}, recomputed {getattr(new, name)!r}"
            for name in ("delta_bpb", "delta_step_pct", "sigma", "sigma_df")
            if not _close(getattr(old, name), getattr(new, name))]
    if [(c.name, c.passed) for c in old.checks] != [(c.name, c.passed) for c in new.checks]:
        out.append(f"checks: recorded {[(c.name, c.passed) for c in old.checks]}, "
                   f"recomputed {[(c.name, c.passed) for c in new.checks]}")
    if len(old.looks) != len(new.looks):
        out.append(f"looks: recorded {len(old.looks)}, recomputed {len(new.looks)}")
    for i, (a, b) in enumerate(zip(old.looks, new.looks, strict=False)):
        for name in Look.__struct_fields__:
            x, y = getattr(a, name), getattr(b, name)
            if not (_close(x, y) if isinstance(y, float) else x == y):
                out.append(f"look {i + 1} {name}: recorded {x!r}, recomputed {y!r}")
    return out


def _close(a: float | None, b: float | None) -> bool:
    """Equal up to what another scipy may change in the last digits."""
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


__all__ = [
    "BreadthVerdict", "Converged", "Facts", "GateError", "breadth_verdict", "confirm_step", "early_verdict", "facts_of",
    "recompute",
]
