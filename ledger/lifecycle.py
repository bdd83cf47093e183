"""The order of a trial's events, checked.

    trial.proposed -> preflight.passed | preflight.refused
                   -> breadth.started / ended*, confirm.started / ended*
                   -> decided -> (keep) commit.intent -> commit.done | commit.void
                   -> (kept) honest.measured* -> (revert) revert.intent -> trial.reverted | revert.void

``timing.measured`` stands anywhere between preflight and the end. ``trial.failed`` and ``trial.abandoned`` may
end it anywhere before ``decided``. After the end only the commit of a keep follows, and what becomes of it.
Findings, reviews and notes are free. Unknown types never get here (readers skip them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ledger.decode import Record
from ledger.measured import HonestMeasured, RevertIntent, RevertVoid, TrialReverted
from ledger.problems import Problem, problem_at
from ledger.records import (
    TERMINAL,
    CommitDone,
    CommitIntent,
    CommitVoid,
    Decided,
    StageEnded,
    StageStarted,
    TrialFailed,
)

_STAGES = ("breadth", "confirm")
_AFTER_KEEP = frozenset({"honest.measured", "revert.intent", "trial.reverted", "revert.void"})
_TRIAL_TYPES = frozenset(
    {"trial.proposed", "preflight.passed", "timing.measured", "commit.intent", "commit.done", "commit.void", *TERMINAL}
    | _AFTER_KEEP
    | {f"{stage}.{step}" for stage in _STAGES for step in ("started", "ended")}
)


@dataclass
class _Trial:
    """What has been seen of one trial."""

    proposed: bool = False
    passed: bool = False
    terminal: str = ""
    keep: Record | None = None
    intent: Record | None = None
    sha: str = ""
    settled: bool = False
    done: bool = False  # settled by commit.done
    condemned: bool = False  # measured again, and to be reverted
    revert: str = ""  # sha of revert.intent
    reverted: bool = False
    started: set[tuple[str, str]] = field(default_factory=set)  # (stage, run id)
    ended: set[tuple[str, str]] = field(default_factory=set)


Report = Callable[[Record, str, str], None]


def check(records: list[Record]) -> list[Problem]:
    """Every breach of the life cycle, in file order; a keep whose commit is still owed is a warning."""
    problems: list[Problem] = []
    trials: dict[tuple[str, str], _Trial] = {}
    searches: set[str] = set()
    owed: dict[str, _Trial] = {}  # search -> the keep that is not settled yet

    def report(record: Record, rule: str, reason: str) -> None:
        problems.append(problem_at(record, rule, reason))

    for record in records:
        if record.type == "search.started":
            searches.add(record.search)
        elif record.type == "search.ended" and record.search not in searches:
            report(record, "search", f"search {record.search!r} ends without having started")
        if record.type not in _TRIAL_TYPES:
            continue
        if not record.trial:
            report(record, "lifecycle", f"{record.type} names no trial")
            continue
        trial = trials.setdefault((record.search, record.trial), _Trial())
        _step(trial, record, report)
        if record.type == "decided":
            _owe(owed, trial, record, report)
    for trial in owed.values():
        if not trial.settled and trial.keep is not None:
            reason = "the commit of this keep is still owed: the next `autoresearch search` will finish it"
            problems.append(problem_at(trial.intent or trial.keep, "commit", reason, "warning"))
    return problems


def _owe(owed: dict[str, _Trial], trial: _Trial, record: Record, report: Report) -> None:
    """A search settles one keep before it decides the next trial."""
    before = owed.get(record.search)
    if before is not None and before is not trial and not before.settled and before.keep is not None:
        reason = "this keep was never committed nor voided, yet the search went on"
        report(before.intent or before.keep, "commit", reason)
        del owed[record.search]
    if trial.keep is record:
        owed[record.search] = trial


def _step(trial: _Trial, record: Record, report: Report) -> None:
    kind = record.type
    if kind == "trial.proposed":
        if trial.proposed:
            report(record, "lifecycle", "the trial was already proposed")
        trial.proposed = True
        return
    if not trial.proposed:
        report(record, "lifecycle", f"{kind} before trial.proposed")
        trial.proposed = True  # say it once
    if kind.startswith("commit."):
        _commit(trial, record, report)
        return
    if kind in _AFTER_KEEP:
        _after_keep(trial, record, report)
        return
    if trial.terminal:
        again = "a second end" if kind in TERMINAL else kind
        report(record, "lifecycle", f"{again} ({kind}) after {trial.terminal}: the trial was over")
        return
    if kind == "preflight.passed":
        trial.passed = True
    elif kind == "timing.measured":
        if not trial.passed:
            report(record, "lifecycle", "timing.measured before preflight.passed")
    elif kind in TERMINAL:
        trial.terminal = kind
        _verdict(trial, record, report)
    else:
        _stage(trial, record, report)


def _stage(trial: _Trial, record: Record, report: Report) -> None:
    stage, _, step = record.type.partition(".")
    if not trial.passed:
        report(record, "lifecycle", f"{record.type} before preflight.passed")
        trial.passed = True
    if step == "started" and isinstance(record.body, StageStarted):
        trial.started.add((stage, record.body.run_id))
    elif isinstance(record.body, StageEnded):
        run = (stage, record.body.run.run_id)
        if run not in trial.started:
            report(record, "lifecycle", f"run {run[1]!r} ended in {stage} without having started there")
        if run in trial.ended:
            report(record, "lifecycle", f"run {run[1]!r} ended twice in {stage}")
        trial.ended.add(run)


def _verdict(trial: _Trial, record: Record, report: Report) -> None:
    body = record.body
    if isinstance(body, TrialFailed) and not body.reason.startswith("failed."):
        report(record, "lifecycle", f"trial.failed with reason {body.reason!r}: expected failed.*")
    if not isinstance(body, Decided):
        return
    if body.verdict not in ("keep", "reject"):
        # An unknown verdict must never pass for a keep.
        report(record, "lifecycle", f"verdict {body.verdict!r} is neither keep nor reject")
    elif (body.verdict == "keep") != body.reason.startswith("kept."):
        report(record, "lifecycle", f"verdict {body.verdict} with reason {body.reason!r}")
    if body.verdict == "keep":
        trial.keep = record
        if not trial.passed:
            report(record, "lifecycle", "kept without preflight.passed")
        if not any(stage == "confirm" for stage, _ in trial.ended) and not body.candidate:
            report(record, "lifecycle", "kept without any confirm run")


def _commit(trial: _Trial, record: Record, report: Report) -> None:
    body = record.body
    if isinstance(body, CommitIntent):
        if trial.keep is None:
            report(record, "commit", "commit.intent without a keep")
        if trial.intent is not None:
            report(record, "commit", "a second commit.intent: at most one commit per verdict")
        trial.intent, trial.sha = record, body.sha
    elif isinstance(body, CommitDone | CommitVoid):
        if trial.intent is None:
            report(record, "commit", f"{record.type} without commit.intent")
        elif body.sha != trial.sha:
            report(record, "commit", f"{record.type} names {body.sha[:12]}, the intent {trial.sha[:12]}")
        if trial.settled:
            report(record, "commit", f"{record.type}: this intent was already settled")
        trial.settled = True
        trial.done = isinstance(body, CommitDone)


def _after_keep(trial: _Trial, record: Record, report: Report) -> None:
    """Measured again, and perhaps taken back: only a keep whose commit is done, and at most once."""
    body = record.body
    if not trial.done:
        report(record, "lifecycle", f"{record.type} before the keep's commit.done")
    if isinstance(body, HonestMeasured):
        if trial.reverted or trial.condemned:
            report(record, "lifecycle", "measured again after it was to be reverted")
        trial.condemned = body.decision == "revert"
    elif isinstance(body, RevertIntent):
        if trial.revert:
            report(record, "commit", "a second revert.intent")
        if not trial.condemned and body.reason == "reverted.honest":
            report(record, "commit", "revert.intent, but no honest.measured asked for it")
        if body.reverts != trial.sha:
            report(record, "commit", f"revert.intent takes {body.reverts[:12]} back, the keep is {trial.sha[:12]}")
        trial.revert = body.sha
    elif isinstance(body, TrialReverted | RevertVoid):
        if not trial.revert:
            report(record, "commit", f"{record.type} without revert.intent")
        elif body.sha != trial.revert:
            report(record, "commit", f"{record.type} of {body.sha}, but the revert intended {trial.revert}")
        if trial.reverted:
            report(record, "commit", f"a second end ({record.type}) of one revert")
        trial.reverted = isinstance(body, TrialReverted)
        if isinstance(body, RevertVoid):
            trial.revert = ""  # planned again on the branch's new tip
