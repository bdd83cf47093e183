"""What ``ledger verify`` asks beyond the chain: do the records agree with each other, and with what git holds?

A hash chain proves little against a hand that rewrites all of it. So every figure that is written twice is
compared with its other copy, verdicts and configurations are computed again, and git's own witnesses (the
ledger's copy under its ref, the trailers of kept commits) are held against the file. Nothing is written.
Here: the records among themselves. With git: ``harness.audit_git``.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from harness.audit_git import commits, configurations, mirrored, witnessed
from harness.gate.verdict import recompute
from harness.gitrepo import Repo
from harness.settle import honest_figures
from ledger.decode import Record
from ledger.measured import HonestMeasured, TimingMeasured
from ledger.problems import Problem, problem_at
from ledger.records import (
    CommitIntent,
    ControlEnded,
    Decided,
    Finding,
    NoiseMeasured,
    PreflightPassed,
    PreflightRefused,
    RunFigures,
    StageEnded,
    TrialProposed,
)
from ledger.verify import Check

__all__ = ["checks", "commits", "findings", "honesty", "intents", "measured", "noises", "verdicts"]

TrialKey = tuple[str, str]  # search, trial


def checks(repo: Repo, ledger_path: Path) -> list[Check]:
    """Every check of this module, for ``ledger.verify.verify``. Raises InfraError when git fails.

    Call it before the file is read: git's tips are taken here, and a search that goes on meanwhile writes to the
    file first, so that the file must hold whatever git held now.
    """
    return [verdicts, commits(repo), mirrored(repo, ledger_path), measured, noises, honesty, findings, intents,
            configurations(repo), witnessed(repo)]


def verdicts(records: list[Record]) -> list[Problem]:
    """Judge every recorded verdict again from its own figures."""
    found = []
    for record in records:
        if isinstance(record.body, Decided):
            found += [problem_at(record, "verdict", text) for text in recompute(record.body)]
        elif isinstance(record.body, PreflightRefused) and not record.body.reason:
            found.append(problem_at(record, "verdict", "a refusal without a reason"))
    return found


class _Run(NamedTuple):
    """A measured run and the 1-based line that recorded it."""

    line: int
    figures: RunFigures


def measured(records: list[Record]) -> list[Problem]:
    """The figures that a verdict was made from are those of the runs recorded before it, field by field."""
    runs: dict[tuple[object, ...], _Run] = {}
    proposed: dict[TrialKey, TrialProposed] = {}
    timing: dict[TrialKey, list[list[float]]] = {}
    found = []
    for record in records:
        body, search = record.body, record.search
        if isinstance(body, TrialProposed):
            proposed[search, record.trial] = body
        elif isinstance(body, StageEnded):
            stage = record.type.partition(".")[0]
            runs[search, record.trial, stage, body.run.k] = _Run(record.seq + 1, body.run)
        elif isinstance(body, ControlEnded):
            runs[_control_key(search, body, body.run.k)] = _Run(record.seq + 1, body.run)
        elif isinstance(body, PreflightPassed) and body.control_step_ms > 0.0:
            timing[search, record.trial] = [[body.control_step_ms, body.step_ms]]
        elif isinstance(body, TimingMeasured):
            timing[search, record.trial] = body.pairs
        elif isinstance(body, Decided):
            if body.timing and body.timing != timing.get((search, record.trial)):
                found.append(problem_at(record, "figures", f"judged by step times {body.timing}, on record before it: "
                                                           f"{timing.get((search, record.trial))}"))
            for run in body.candidate:
                found += _same_run(record, "candidate", run, runs.get((search, record.trial, body.stage, run.k)))
            p = proposed.get((search, record.trial))
            for run in body.control if p else []:
                key = (search, body.stage, p.generation, p.parent_config, p.fingerprint, run.k)  # type: ignore[union-attr]
                found += _same_run(record, "control", run, runs.get(key))
    return found


def _control_key(search: str, body: ControlEnded, k: int) -> tuple[object, ...]:
    return search, body.stage, body.generation, body.config_hash, body.fingerprint, k


def _same_run(record: Record, side: str, run: RunFigures, logged: _Run | None) -> list[Problem]:
    if logged is None:
        return [problem_at(record, "figures", f"{side} run k={run.k} ({run.run_id}) was judged, but no record before "
                                              "this one says that it ended")]
    if run == logged.figures:
        return []
    differ = [f"{name} {getattr(run, name)!r} (there {getattr(logged.figures, name)!r})"
              for name in RunFigures.__struct_fields__ if getattr(run, name) != getattr(logged.figures, name)]
    return [problem_at(record, "figures", f"{side} run k={run.k} is not the run that line {logged.line} recorded: "
                                          + ", ".join(differ))]


def noises(records: list[Record]) -> list[Problem]:
    """Each noise figure is of one incumbent's control runs, as they stood when it was written."""
    runs: dict[tuple[object, ...], dict[int, float]] = {}
    found = []
    for record in records:
        body = record.body
        if isinstance(body, ControlEnded):
            runs.setdefault(_control_key(record.search, body, 0), {})[body.run.k] = body.run.val_bpb
        elif isinstance(body, NoiseMeasured):
            banks = [[group[k] for k in sorted(group)] for key, group in runs.items()
                     if key[:2] == (record.search, body.stage)]
            if body.values not in banks:
                found.append(problem_at(record, "figures", f"noise was measured from {body.values}, which are the "
                                                           "control runs of no incumbent recorded before it"))
    return found


def honesty(records: list[Record]) -> list[Problem]:
    """What a keep showed on fresh seeds follows from the control runs of both sides, and the decision from that."""
    runs: dict[tuple[object, ...], float] = {}
    decided: dict[TrialKey, Decided] = {}
    found = []
    for record in records:
        body = record.body
        if isinstance(body, ControlEnded) and body.stage == "confirm":
            runs[record.search, body.fingerprint, body.generation, body.config_hash, body.run.k] = body.run.val_bpb
        elif isinstance(body, Decided):
            decided[record.search, record.trial] = body
        elif isinstance(body, HonestMeasured):
            verdict = decided.get((record.search, record.trial))
            found += [problem_at(record, "figures", text) for text in _dishonest(record, body, verdict, runs)]
    return found


def _dishonest(
    record: Record, body: HonestMeasured, verdict: Decided | None, runs: dict[tuple[object, ...], float],
) -> list[str]:
    sides = [[runs.get((record.search, body.fingerprint, body.generation, config, k)) for k in body.ks]
             for config in (body.parent_config, body.config_hash)]
    if verdict is None or any(x is None for side in sides for x in side):
        return ["the keep or the control runs that it rests on are not recorded before it"]
    parent, kept = ([x for x in side if x is not None] for side in sides)
    again = honest_figures(verdict, parent, kept, body.last)
    return [f"{name} is {getattr(body, name)!r}, the runs give {value!r}" for name, value in again.items()
            if getattr(body, name) != value]


def findings(records: list[Record]) -> list[Problem]:
    """What a finding says was measured is what the trial's verdict says."""
    decided: dict[TrialKey, Decided] = {}
    found = []
    for record in records:
        if isinstance(record.body, Decided):
            decided[record.search, record.trial] = record.body
        elif isinstance(record.body, Finding):
            verdict = decided.get((record.search, record.trial))
            want = verdict.delta_bpb if verdict else None
            if record.body.measured_bpb != want:
                found.append(problem_at(record, "finding", f"measured_bpb is {record.body.measured_bpb!r}, the trial's "
                                                           f"verdict says delta_bpb {want!r}"))
    return found


def intents(records: list[Record]) -> list[Problem]:
    """A commit is intended for the configuration that was proposed (that it is done as intended: lifecycle)."""
    proposed: dict[TrialKey, str] = {}
    found = []
    for record in records:
        body, key = record.body, (record.search, record.trial)
        if isinstance(body, TrialProposed):
            proposed[key] = body.config_hash
        elif isinstance(body, CommitIntent) and body.config_hash != proposed.get(key, body.config_hash):
            found.append(problem_at(record, "commit", f"config_hash {body.config_hash[:12]} is not the proposal's "
                                                      f"{proposed[key][:12]}"))
    return found
