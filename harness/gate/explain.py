"""Verdicts in plain words, with every figure they rest on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.gate.advantage import Advantage
from harness.gate.looks import Evidence
from harness.gate.noise import Noise
from harness.gate.policy import Policy
from ledger.records import Decided, EarlyStop, Look, SubCheck

REASONS: dict[str, str] = {
    "kept.gain": "the candidate is better by more than the track's materiality, beyond what chance explains",
    "kept.cheaper": "the candidate weighs less, and its score is not worse beyond the margin",
    "kept.faster": "the candidate's steps take less time, and its score is not worse beyond the margin",
    "kept.simpler": "the candidate needs fewer settings, and its score is not worse beyond the margin",
    "rejected.worse": "the candidate is worse",
    "rejected.noise": "no gain could be told from noise within the planned pairs",
    "rejected.immaterial": "the gain, if there is one, is too small to matter",
    "rejected.bytes": "the artifact does not fit under the track's cap",
    "rejected.runtime": "a training step takes too long",
    "continue": "more pairs are needed",
}
"""What each reason code of the gate means; the codes of preflight are explained where they arise."""


def _warning(policy: Policy) -> str:
    return "[test track: this verdict means nothing] " if policy.for_tests_only else ""


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def limit(policy: Policy, check: SubCheck) -> str:
    """A hard limit was broken."""
    return (f"{_warning(policy)}Rejected before any comparison, {check.name}: {check.detail}. "
            "No gain can make up for it.")


def waiting(policy: Policy, have: int, need: int, looks: Sequence[Look]) -> str:
    """Not enough pairs for the next look."""
    text = f"{_warning(policy)}{_count(have, 'pair')} measured; the next look is at {need}"
    if looks:
        last = looks[-1]
        text += (f"; at {last.n} the utility is {last.mean:+.5f} +- {last.se:.5f} bpb, not below the "
                 f"futility line {last.futility:+.5f}, and its lower bound {last.lower:+.5f} "
                 f"not yet a keep (materiality {policy.materiality_bpb:g})")
    return text + "."


def breadth(policy: Policy, evidence: Evidence, threshold: float, veto: bool) -> str:
    """Breadth's answer."""
    each = ", ".join(f"{d:+.5f}" for d in evidence.differences)
    said = "Vetoed" if veto else "Promoted"
    relation = "below" if veto else "not below"
    return (f"{_warning(policy)}{said} at breadth: gain {evidence.gain:+.5f} bpb over "
            f"{_count(evidence.n, 'pair')} (per seed {each}), {relation} {threshold:+.5f} = "
            f"-{policy.breadth_veto_sigmas:g} standard errors of {evidence.se:.5f} "
            f"(sigma {evidence.sigma:.5f}, {evidence.df:g} degrees of freedom).")


def untimed(policy: Policy, reason: str, wanted: int) -> str:
    """The verdict waits for step times."""
    return (f"{_warning(policy)}The runs say {reason}; before that is decided, incumbent and candidate take turns for "
            f"{_count(wanted, 'pair')} of step times.")


def early(policy: Policy, stop: EarlyStop) -> str:
    """A breadth run was given up."""
    return (f"{_warning(policy)}Given up at step {stop.step} of {stop.of} of its breadth run (seed {stop.seed}): dev "
            f"loss {stop.candidate:.4f} against the incumbent's {stop.control:.4f} nats/token at the same step and "
            f"seed, more than {stop.threshold:g} above it.")


def outcome(
    policy: Policy, noise: Noise, evidence: Evidence, looks: Sequence[Look], reason: str,
    plus: Advantage | None = None,
) -> str:
    """The verdict of the last look taken, as one paragraph."""
    look = looks[-1]
    word = "Kept" if reason.startswith("kept") else "Rejected"
    paired = evidence.form == "paired"
    if paired:
        each = ", ".join(f"{d:+.5f}" for d in evidence.differences)
        basis = f"{_count(evidence.n, 'pair')} (per seed {each})"
    else:
        basis = (f"{_count(evidence.n, 'run')} against {_count(evidence.controls, 'control')}, unpaired "
                 f"because the same-seed correlation {noise.correlation:.2f} is below "
                 f"{policy.min_correlation:g}")
    relation = "above" if look.lower > policy.materiality_bpb else "not above"
    parts = [
        f"{_warning(policy)}{word} ({reason}): {REASONS[reason]}.",
        f"Gain {evidence.gain:+.5f} bpb over {basis}.",
        f"Utility {look.mean:+.5f} = gain {evidence.gain:+.5f}, charged {evidence.byte_charge:+.5f} for "
        f"{evidence.delta_bytes:+,.0f} bytes and {evidence.time_charge:+.5f} for "
        f"{evidence.delta_step_pct:+.1f}% step time ({policy.time_deadband_pct:g}% taken for timing noise).",
        f"Its lower bound is {look.lower:+.5f} = {look.mean:+.5f} - {look.boundary:.3f} x {look.se:.5f}, "
        f"{relation} the materiality {policy.materiality_bpb:g}.",
        *_advantage(policy, evidence, look, plus),
        f"Noise: sigma {look.sigma:.5f} with {look.df:g} degrees of freedom (pool "
        f"{noise.sigma_d if paired else noise.sigma_run:.5f}, {_count(int(noise.trials), 'earlier trial')}; "
        f"shipped scale: {policy.prior.source}).",
    ]
    if word == "Rejected" and look.n < policy.max_pairs:
        parts.append(f"Stopped early at look {len(looks)} of {len(policy.looks)}: the utility lies below the "
                     f"futility line {look.futility:+.5f}, so a keep at {policy.max_pairs} pairs had a "
                     f"chance under {policy.futility_power:.0%}.")
    if look.decision != "keep" and look.lower > policy.materiality_bpb:
        parts.append(f"The bound rests on fewer bytes, and the score may have lost more than "
                     f"{policy.noninferiority_bpb:g} bpb (lower bound of the gain "
                     f"{evidence.gain - look.boundary * evidence.se:+.5f}).")
    return " ".join(parts)


def _advantage(policy: Policy, evidence: Evidence, look: Look, plus: Advantage | None) -> list[str]:
    """What the candidate has beside its score, and whether its score allows to keep it for that."""
    if plus is None:
        return []
    bound = evidence.gain - look.boundary * evidence.se
    if not plus.worth(look.mean):
        return [f"It has an advantage ({plus.text}), which at the track's prices does not pay for the score."]
    relation = "above" if bound > -policy.noninferiority_bpb else "not above"
    return [f"It has an advantage ({plus.text}); the lower bound of its gain is {bound:+.5f}, {relation} the allowed "
            f"loss of {policy.noninferiority_bpb:g}."]


def explain(decided: Decided) -> str:
    """A whole recorded verdict, several lines: words, every run, every check, every look, the policy.

    Works from the record alone and does not judge again (``verdict.recompute`` does).
    """
    lines = [f"{decided.verdict.upper()} {decided.reason}: {REASONS.get(decided.reason, 'see below')}",
             decided.explanation]
    if decided.candidate:
        lines += ["", *_runs(decided)]
    if decided.checks:
        lines += ["", "checks:"]
        lines += [f"  {'ok  ' if c.passed else 'FAIL'} {c.name}: {c.detail}" for c in decided.checks]
    if decided.looks:
        lines += ["", "looks (utility in bpb, positive = better):", *_looks(decided)]
    if decided.timing:
        turns = ", ".join(f"{c:.4g} -> {x:.4g}" for c, x in decided.timing)
        lines += ["", f"step ms of incumbent -> candidate, taking turns: {turns}"]
    if decided.early:
        e = decided.early
        lines += ["", f"given up at step {e.step} of {e.of}: dev loss {e.candidate:.5f} against {e.control:.5f}, "
                      f"limit {e.threshold:g} above"]
    lines += ["", *_figures(decided)]
    return "\n".join(lines)


def _runs(decided: Decided) -> list[str]:
    """One line per seed: control, candidate, difference, bytes, step time."""
    lines = [f"runs ({decided.stage}):",
             "    k                 seed   control bpb  candidate bpb       gain      bytes  step ms"]
    control = {r.k: r for r in decided.control}
    candidate = {r.k: r for r in decided.candidate}
    for k in sorted(control | candidate):
        c, x = control.get(k), candidate.get(k)
        run = x or c
        assert run is not None
        gain = f"{c.val_bpb - x.val_bpb:+10.5f}" if c and x and c.seed == x.seed else " " * 10
        lines.append(f"  {k:3d} {run.seed:20d} {f'{c.val_bpb:13.5f}' if c else ' ' * 13} "
                     f"{f'{x.val_bpb:14.5f}' if x else ' ' * 14} {gain} "
                     f"{run.artifact_bytes + run.code_bytes:10d} {run.step_ms:8.2f}")
    return lines


def _looks(decided: Decided) -> list[str]:
    lines = []
    for look in decided.looks:
        lines.append(
            f"  n={look.n}: {look.mean:+.5f} +- {look.se:.5f} (sigma {look.sigma:.5f}, df {look.df:g}), "
            f"boundary {look.boundary:.3f} -> lower bound {look.lower:+.5f}; futility below "
            f"{look.futility:+.5f}: {look.decision}")
    return lines


def _figures(decided: Decided) -> list[str]:
    """Deltas, noise and policy."""
    p: dict[str, Any] = decided.policy
    lines = []
    if decided.delta_bpb is not None:
        lines.append(f"candidate minus control: {decided.delta_bpb:+.5f} bpb, "
                     f"{decided.delta_bytes or 0:+,d} bytes, {decided.delta_step_pct or 0.0:+.1f}% step time")
    if decided.noise_prior:
        lines.append("noise prior: " + ", ".join(f"{k} {v:.5g}" for k, v in decided.noise_prior.items()))
    if p:
        lines.append(f"policy {decided.policy_hash[:12]} ({p.get('track', '?')}): alpha {p.get('alpha')}, "
                     f"spending {p.get('spending')}, looks {p.get('looks')}, materiality "
                     f"{p.get('materiality_bpb')} bpb, price per MB {p.get('price_mb')}, per 1% step time "
                     f"{p.get('price_time')}")
    return lines
