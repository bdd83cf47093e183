"""History under another policy: every recorded verdict judged again from its own recorded figures. Pure, no I/O.

What it can't tell, and says: figures that were never measured ("needs 2 more pairs"), and what would have come
after a verdict that differs, since later trials were compared with the incumbent that the recorded ones left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from harness.gate.correlation import calibration_for, noise_before
from harness.gate.noise import Noise, noise_from_dict
from harness.gate.policy import Policy, from_dict
from harness.gate.verdict import breadth_verdict, confirm_step, early_verdict, facts_of
from ledger.decode import Record
from ledger.records import (
    CalibrationMeasured,
    ControlEnded,
    Decided,
    RunFigures,
    SearchStarted,
    StageEnded,
    TrialProposed,
)

POOLING = ("prior", "pool_clip", "pool_df_cap")
"""Policy fields that the noise pool depends on: where they agree, the recorded pool is the replayed one."""

CAVEATS = (
    "A replayed keep or rejection that differs would have changed the incumbent that later trials were compared with: "
    "from the first difference on, read the rows one by one, not as a history.",
    "Only figures that were measured are judged: nothing is re-run, and runs that the other policy would have "
    "saved are still in the noise pool.",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recorded verdict and what its trial measured before it."""

    search: str
    trial: str
    track: str
    fingerprint: str
    decided: Decided
    calibration: CalibrationMeasured | None = None  # in force when its search was started or resumed
    breadth_control: tuple[RunFigures, ...] = ()
    breadth_candidate: tuple[RunFigures, ...] = ()

    @property
    def section(self) -> str:
        """Section of the policy file that judged it."""
        return str(self.decided.policy.get("track", ""))


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """One row. ``verdict``: keep | reject | undecided (the figures do not suffice)."""

    search: str
    trial: str
    section: str
    recorded: str
    recorded_reason: str
    recorded_pairs: int  # confirm pairs at the look that decided, 0 when no look was taken
    verdict: str
    reason: str
    pairs: int
    noise: str  # recorded | re-pooled | none (not judged from runs)
    detail: str  # what differs, or is missing; "" when nothing

    @property
    def changed(self) -> bool:
        """Another verdict or another reason."""
        return (self.verdict, self.reason) != (self.recorded, self.recorded_reason)


@dataclass
class _Trial:
    """What is known of a trial before its verdict."""

    proposed: TrialProposed
    breadth: dict[int, RunFigures] = field(default_factory=dict)


def cases(records: Iterable[Record]) -> list[Case]:
    """Every verdict of a ledger in its order, with its trial's breadth runs and the incumbent's on the same seeds."""
    trials: dict[tuple[str, str], _Trial] = {}
    tracks: dict[str, str] = {}  # fingerprint -> track
    known: dict[str, CalibrationMeasured] = {}  # fingerprint -> the last one so far
    in_force: dict[tuple[str, str], CalibrationMeasured | None] = {}  # (search, fingerprint)
    controls: dict[tuple[str, int, str, str], dict[int, RunFigures]] = {}
    out: list[Case] = []
    for r in records:
        body, key = r.body, (r.search, r.trial)
        if isinstance(body, CalibrationMeasured):
            known[body.fingerprint] = body
        elif isinstance(body, SearchStarted):
            tracks[body.fingerprint] = body.track
            in_force[r.search, body.fingerprint] = known.get(body.fingerprint)
        elif isinstance(body, TrialProposed):
            trials[key] = _Trial(body)
        elif isinstance(body, ControlEnded) and body.stage == "breadth":
            group = (r.search, body.generation, body.config_hash, body.fingerprint)
            controls.setdefault(group, {})[body.run.k] = body.run
        elif isinstance(body, StageEnded) and r.type == "breadth.ended" and key in trials:
            trials[key].breadth[body.run.k] = body.run
        elif isinstance(body, Decided) and key in trials:
            t = trials[key]
            p = t.proposed
            bank = controls.get((r.search, p.generation, p.parent_config, p.fingerprint), {})
            both = [k for k in t.breadth if k in bank]
            track = tracks.get(p.fingerprint) or str(body.policy.get("track", ""))
            out.append(Case(search=r.search, trial=r.trial, track=track, fingerprint=p.fingerprint, decided=body,
                            calibration=in_force.get((r.search, p.fingerprint)),
                            breadth_control=tuple(bank[k] for k in both),
                            breadth_candidate=tuple(t.breadth[k] for k in both)))
    return out


def measured(records: Iterable[Record], track: str) -> tuple[list[Decided], CalibrationMeasured | None]:
    """(verdicts, calibration) of a track under the fingerprint that was used or calibrated last: one pool's figures."""
    records, last = list(records), ""
    for r in records:
        if isinstance(r.body, SearchStarted | CalibrationMeasured) and r.body.track == track:
            last = r.body.fingerprint
    found = [c.decided for c in cases(records) if c.fingerprint == last]
    return found, calibration_for(records, last)


def replay(found: Sequence[Case], policy_of: Callable[[str], Policy]) -> list[Replayed]:
    """Every case under the policy of its section. ``policy_of`` may raise PolicyError, which is passed on.

    The noise that a verdict starts from is pooled again, from the calibration in force and the recorded confirm
    verdicts before it in its search and under its fingerprint, with the other policy's prior and clip. Where those
    fields are the recorded policy's, the recorded pool is used: it is the same, and holds whatever else went into it.
    """
    history: dict[tuple[str, str], list[Decided]] = {}
    out: list[Replayed] = []
    for case in found:
        policy = policy_of(case.section)
        before = history.setdefault((case.search, case.fingerprint), [])
        try:
            noise, source = pooled(policy, case, before)
            new = again(policy, case, noise)
        except ValueError as e:  # GateError, PolicyError, NoiseError: these figures can't be judged by that policy
            source, new = "none", Outcome("undecided", "", 0, f"cannot be judged: {e}")
        old = case.decided
        recorded_pairs = old.looks[-1].n if old.looks else 0
        detail = new.detail
        if not detail and new.pairs != recorded_pairs:
            detail = f"decided at {new.pairs} pairs, recorded at {recorded_pairs}"
        out.append(Replayed(
            search=case.search, trial=case.trial, section=case.section, recorded=old.verdict,
            recorded_reason=old.reason, recorded_pairs=recorded_pairs, verdict=new.verdict, reason=new.reason,
            pairs=new.pairs, noise=source if old.candidate or old.early else "none", detail=detail))
        if old.stage == "confirm":
            before.append(old)
    return out


def pooled(policy: Policy, case: Case, before: Sequence[Decided]) -> tuple[Noise, str]:
    """(noise that a case would start from under ``policy``, recorded | re-pooled)."""
    decided = case.decided
    old = from_dict(decided.policy)
    if decided.noise_prior and all(getattr(old, name) == getattr(policy, name) for name in POOLING):
        return noise_from_dict(decided.noise_prior), "recorded"
    return repooled(policy, case, before), "re-pooled"


def repooled(policy: Policy, case: Case, before: Sequence[Decided]) -> Noise:
    """The pool from its parts, as a search makes it."""
    return noise_before(policy, before, case.calibration)


@dataclass(frozen=True)
class Outcome:
    """What another policy makes of a case."""

    verdict: str
    reason: str
    pairs: int
    detail: str = ""


def again(policy: Policy, case: Case, noise: Noise) -> Outcome:
    """One verdict again. Raises GateError and its kin when the figures must not be judged by ``policy``."""
    old = case.decided
    if old.stage == "preflight":
        return Outcome(old.verdict, old.reason, 0, "decided at preflight: no policy of the gate changes that")
    if old.early is not None:
        new = early_verdict(policy, old.control, old.early, noise)
        if new is not None:
            return Outcome(new.verdict, new.reason, 0)
        at = f"step {old.early.step} of {old.early.of}"
        return Outcome("undecided", "", 0, f"not given up at {at}: needs its breadth runs finished")
    control = old.control if old.stage == "breadth" else case.breadth_control
    candidate = old.candidate if old.stage == "breadth" else case.breadth_candidate
    missing = ""
    if candidate:
        breadth = breadth_verdict(policy, control, candidate, noise)
        if breadth.decision == "veto":
            why = f"vetoed at breadth: {breadth.mean:+.5f} < {breadth.threshold:+.5f}"
            return Outcome("reject", "rejected.worse", 0, "" if old.stage == "breadth" else why)
        if breadth.decision == "continue":
            missing = f"needs {_more(breadth.needed_pairs - _pairs(control, candidate), 'breadth pair')}"
    if old.stage == "breadth":
        return Outcome("undecided", "", 0, missing or f"breadth promotes it: needs {policy.looks[0]} confirm pairs")
    return _confirm(policy, old, noise, missing)


def _confirm(policy: Policy, old: Decided, noise: Noise, missing: str) -> Outcome:
    """A verdict of confirm; ``missing``: what breadth would still ask for."""
    new = confirm_step(policy, old.control, old.candidate, noise, facts_of(old))
    if new.needed_timing:
        # All but the time is known: judged by the runs' own step times, as where no timing is asked for.
        lacking = new.needed_timing - len(old.timing)
        missing = missing or f"needs {_more(lacking, 'timing pair')} that agree with the runs' own step times"
        untimed = dataclasses.replace(policy, timing_pairs=0)
        new = confirm_step(untimed, old.control, old.candidate, noise, facts_of(old))
    pairs = new.looks[-1].n if new.looks else 0
    if new.verdict == "continue":
        have = _pairs(old.control, old.candidate)
        lacking = _more(new.needed_pairs - have, "pair")
        detail = f"needs {lacking} (has {have}, the next look is at {new.needed_pairs})"
        return Outcome("undecided", "", pairs, missing or detail)
    return Outcome(new.verdict, new.reason, pairs, missing)


def _pairs(control: Sequence[RunFigures], candidate: Sequence[RunFigures]) -> int:
    known = {(r.k, r.seed) for r in control}
    return sum((r.k, r.seed) in known for r in candidate)


def _more(n: int, noun: str) -> str:
    return f"{n} more {noun}" if n == 1 else f"{n} more {noun}s"
