"""Verdicts: pure functions from figures to keep, reject, or measure more.

``breadth_verdict`` may only veto. ``confirm_step`` is called after every confirm run and answers with a
``Decided``; one whose verdict is "continue" says in ``needed_pairs`` how many pairs the next look wants
and is never written to the ledger. ``recompute`` judges a recorded verdict again from its own figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from msgspec import structs

from harness.gate import explain
from harness.gate import noise as noise_mod
from harness.gate.boundaries import t_upper
from harness.gate.checks import GateError, Sides, check_bytes, check_runtime, prepare
from harness.gate.looks import Evidence, available, controls_at, ready, take, weigh
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
                          cost_seconds=cost_seconds)
    return BreadthVerdict(
        decision="veto" if veto else "promote", explanation=text, needed_pairs=0, n=n, mean=evidence.gain,
        se=evidence.se, sigma=evidence.sigma, df=evidence.df, threshold=threshold, decided=decided)


def confirm_step(
    policy: Policy, control: Sequence[RunFigures], candidate: Sequence[RunFigures], noise: Noise,
    track_cap_bytes: int, *, cost_seconds: float = 0.0,
) -> Decided:
    """Judge what has been measured so far.

    Hard limits first: bytes at once, on every candidate run; step time as soon as a look can be taken.
    Then the looks in order, as far as there are runs. The answer's verdict is keep, reject or continue;
    ``delta_bpb`` is candidate minus control (negative is better), ``Look.mean`` is the utility (positive
    is better). ``cost_seconds`` is carried into the record. Raises GateError when the figures must not be
    compared (other evaluator, data, slice, seeds or code tree, a run twice, a non-finite figure).
    """
    form = noise_mod.form(policy, noise)
    sides = _trim(policy, prepare(control, candidate), form)
    checks = [_comparable(sides), check_bytes(policy, sides.candidate, track_cap_bytes)]
    common = {"cap_bytes": track_cap_bytes, "cost_seconds": cost_seconds, "checks": checks}
    if not checks[-1].passed:
        return _record(policy, sides, noise, None, "reject", "rejected.bytes",
                       explain.limit(policy, checks[-1]), **common)
    looks: list[Look] = []
    evidence: Evidence | None = None
    for index, n in enumerate(policy.looks):
        if not ready(policy, sides, form, n):
            text = explain.waiting(policy, available(policy, sides, form), n, looks)
            return _record(policy, sides, noise, evidence, "continue", "continue", text, looks=looks,
                           needed_pairs=n, **common)
        evidence = weigh(policy, noise, sides, form, n)
        if index == 0:
            checks.append(_runtime(policy, sides, form))
            if not checks[-1].passed:
                return _record(policy, sides, noise, evidence, "reject", "rejected.runtime",
                               explain.limit(policy, checks[-1]), **common)
        look = take(policy, evidence, index)
        if look.decision == "keep" and not _affordable(policy, evidence, look):
            look = _refuse(look, last=index == len(policy.looks) - 1)
        looks.append(look)
        if look.decision != "continue":
            break
    assert evidence is not None  # a policy has at least one look
    verdict, reason = _reason(policy, sides, evidence, looks[-1])
    text = explain.outcome(policy, noise, evidence, looks, reason)
    return _record(policy, sides, noise, evidence, verdict, reason, text, looks=looks, **common)


def _comparable(sides: Sides) -> SubCheck:
    """States what :func:`prepare` has enforced (it raises otherwise)."""
    run = sides.candidate[0]
    return SubCheck(
        name="comparable", passed=True,
        detail=f"{len(sides.control)} control and {len(sides.candidate)} candidate runs, all finite, of one "
               f"evaluator ({run.evaluator_hash[:12]}), one data set ({run.data_fingerprint[:12]}), "
               f"split {run.split}, {run.eval_tokens} tokens; pairs share their seeds")


def _runtime(policy: Policy, sides: Sides, form: str) -> SubCheck:
    """Step times over every pair there is (two-sample: over all runs)."""
    if form == "paired":
        matched = sides.matched(sides.pairs)
        return check_runtime(policy, [c for c, _ in matched], [x for _, x in matched])
    return check_runtime(policy, sides.control, sides.candidate)


def _affordable(policy: Policy, evidence: Evidence, look: Look) -> bool:
    """A keep that rests on fewer bytes must not have lost bpb: its lower bound stays inside the margin."""
    if evidence.gain - evidence.time_charge > policy.materiality_bpb:
        return True
    return evidence.gain - look.boundary * evidence.se >= -policy.noninferiority_bpb


def _refuse(look: Look, *, last: bool) -> Look:
    """The same look without its keep."""
    return structs.replace(look, decision="reject" if last else "continue")


def _reason(policy: Policy, sides: Sides, evidence: Evidence, look: Look) -> tuple[str, str]:
    """(verdict, reason code) of the look that ended the trial."""
    if look.decision == "keep":
        gained = evidence.gain - evidence.time_charge > policy.materiality_bpb
        return "keep", "kept.gain" if gained else "kept.cheaper"
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
        control = sides.control[: controls_at(policy, policy.max_pairs)]
    return Sides(control=control, candidate=sides.candidate, pairs=sides.pairs)


def _record(
    policy: Policy, sides: Sides, noise: Noise, evidence: Evidence | None, verdict: str, reason: str,
    explanation: str, *, stage: str = "confirm", cap_bytes: int = 0, looks: Sequence[Look] = (),
    checks: Sequence[SubCheck] = (), needed_pairs: int = 0, cost_seconds: float = 0.0,
) -> Decided:
    """The record of a verdict, with the figures it rests on and no others."""
    return Decided(
        verdict=verdict, reason=reason, explanation=explanation, policy_hash=policy.hash,
        policy=policy.to_dict(), stage=stage, control=list(sides.control), candidate=list(sides.candidate),
        noise_prior=noise.to_dict(), looks=list(looks), checks=list(checks),
        delta_bpb=None if evidence is None else -evidence.gain,
        delta_bytes=None if evidence is None else round(evidence.delta_bytes),
        delta_step_pct=None if evidence is None else evidence.delta_step_pct,
        sigma=None if evidence is None else evidence.sigma,
        sigma_df=None if evidence is None else evidence.df,
        cost_seconds=cost_seconds, cap_bytes=cap_bytes, needed_pairs=needed_pairs)


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
        if decided.stage == "breadth":
            again = breadth_verdict(policy, decided.control, decided.candidate, noise).decided
        elif decided.stage == "confirm":
            again = confirm_step(policy, decided.control, decided.candidate, noise, decided.cap_bytes)
        else:
            return [f"stage {decided.stage!r}; valid: preflight, breadth, confirm"]
    except ValueError as e:  # GateError, PolicyError, NoiseError: the figures themselves are impossible
        return [f"cannot be judged again: {e}"]
    if again is None:
        return ["breadth does not veto these figures"]
    return _differences(decided, again)


def _differences(old: Decided, new: Decided) -> list[str]:
    """Where two verdicts on the same figures differ."""
    out = [f"{name}: recorded {getattr(old, name)!r}, recomputed {getattr(new, name)!r}"
           for name in ("verdict", "reason", "delta_bytes", "needed_pairs", "cap_bytes")
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


__all__ = ["BreadthVerdict", "GateError", "breadth_verdict", "confirm_step", "recompute"]
