"""The keep transaction: one git commit per kept trial, exactly once with the ledger.

Order (DESIGN section 5): the object is built and pinned; ``commit.intent`` carries everything needed
to rebuild it; the branch ref is compared and swapped; ``commit.done``. The commit's bytes depend only
on the ``decided`` record and the parent, so a recovery that starts over makes the same sha.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Mapping

from harness.errors import UserError
from harness.gitrepo import TRAILER_HEAD, TRAILER_REVERTS, TRAILER_TRIAL, CommitPlan, Repo
from harness.recipe import parse_recipe, render_recipe
from harness.state import TrialState
from harness.tracks import Track
from harness.workspace import recipe_path
from ledger.measured import RevertIntent, RevertVoid, TrialReverted
from ledger.records import Body, CommitDone, CommitIntent, CommitVoid
from ledger.store import Ledger
from trainer.knobs import KnobValue

PIN = "refs/autoresearch/trial/"


def change_text(change: Mapping[str, KnobValue], previous: Mapping[str, KnobValue]) -> str:
    """``matrix_lr 0.04 -> 0.02, ...``"""
    return ", ".join(f"{k} {_show(previous.get(k))} -> {_show(v)}" for k, v in change.items())


def _show(value: KnobValue | None) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def candidate_files(repo: Repo, track: Track, parent: str, change: Mapping[str, KnobValue]) -> dict[str, str]:
    """The candidate's files that differ from its parent commit: for a knob change, the recipe."""
    path = recipe_path(track.name)
    values = parse_recipe(repo.show(parent, path), track)
    values.update(change)
    return {path: render_recipe(values, track)}


def message(trial: TrialState) -> str:
    """The kept commit's message: subject, hypothesis, figures, trailers. Deterministic in the record."""
    decided, ref, p = trial.decided, trial.decided_ref, trial.proposed
    assert decided and ref
    runs = decided.candidate
    mean = sum(r.val_bpb for r in runs) / len(runs)
    size = max(r.artifact_bytes + r.code_bytes for r in runs)
    return "\n".join([
        f"Keep {change_text(p.change, p.previous)}",
        "",
        p.hypothesis.strip(),
        "",
        decided.explanation.strip(),
        "",
        f"{TRAILER_TRIAL}: {trial.id}",
        f"{TRAILER_HEAD}: {ref[0]}:{ref[1]}",
        f"Reason: {decided.reason}",
        f"Val-Bpb: {mean:.6f}",
        f"Delta-Bpb: {decided.delta_bpb:+.6f}" if decided.delta_bpb is not None else "Delta-Bpb: unknown",
        f"Bytes: {size}",
        "",
    ])


def git_date(ts: str) -> str:
    """A ledger time stamp as git wants it: unix seconds in UTC."""
    return f"{calendar.timegm(time.strptime(ts[:19], '%Y-%m-%dT%H:%M:%S'))} +0000"


def commit_keep(repo: Repo, ledger: Ledger, track: Track, search: str, branch: str, trial: TrialState,
                ) -> CommitDone | CommitVoid:
    """Carry a kept trial's commit to its end from wherever it stands; safe to call again after any kill."""
    recovering = trial.intent is not None
    intent = trial.intent or _prepare(repo, ledger, track, search, branch, trial)
    _rebuild(repo, trial.id, intent)
    ref = intent.branch
    at = repo.rev(ref)
    if at == intent.parent:
        repo.set_ref(ref, intent.sha, old=intent.parent)
        at = repo.rev(ref)
    body: Body
    if at and repo.is_ancestor(intent.sha, at):
        repo.bring_along(ref, intent.parent, intent.sha)
        body = CommitDone(sha=intent.sha, branch=ref, recovered=recovering)
        ledger.append("commit.done", body, search=search, trial=trial.id)
    else:
        body = CommitVoid(sha=intent.sha, reason=f"{ref} moved to {at or 'nothing'} while this keep was on its way; "
                                                 "the candidate is judged again on the new incumbent")
        ledger.append("commit.void", body, search=search, trial=trial.id)
    return body


def revert_keep(
    repo: Repo, ledger: Ledger, track: Track, search: str, branch: str, trial: TrialState,
) -> TrialReverted | RevertVoid:
    """Take a kept trial's commit back with one commit more; safe to call again after any kill.

    The same order as :func:`commit_keep`: object, ``revert.intent``, compare and swap, ``trial.reverted``.
    """
    recovering = trial.revert_intent is not None
    intent = trial.revert_intent or _prepare_revert(repo, ledger, track, search, branch, trial)
    if repo.rev(intent.sha) is None:
        tree = repo.build_tree(intent.parent, intent.files, intent.removes)
        sha = repo.build_commit(CommitPlan(tree, intent.parent, intent.message, intent.date))
        if sha != intent.sha:
            raise RuntimeError(f"trial {trial.id}: rebuilt revert {sha} is not the intended {intent.sha}")
    _pin(repo, revert_pin(trial.id, intent.sha), intent.sha)
    at = repo.rev(intent.branch)
    if at == intent.parent:
        repo.set_ref(intent.branch, intent.sha, old=intent.parent)
        at = repo.rev(intent.branch)
    body: TrialReverted | RevertVoid
    if at and repo.is_ancestor(intent.sha, at):
        repo.bring_along(intent.branch, intent.parent, intent.sha)
        body = TrialReverted(sha=intent.sha, branch=intent.branch, reverts=intent.reverts, reason=intent.reason,
                             recovered=recovering)
        ledger.append("trial.reverted", body, search=search, trial=trial.id)
    else:
        body = RevertVoid(sha=intent.sha, reason=f"{intent.branch} moved to {at or 'nothing'} meanwhile")
        ledger.append("revert.void", body, search=search, trial=trial.id)
    return body


def revert_pin(trial: str, sha: str) -> str:
    """Name under ``PIN`` of a revert commit; a revert that was planned again has another."""
    return f"{trial}-revert-{sha[:12]}"


def _undone(repo: Repo, track: Track, trial: TrialState, tip: str) -> tuple[dict[str, str], list[str]]:
    """(files, paths to remove) that take the keep back from ``tip``, and nothing that somebody committed since."""
    assert trial.intent
    kept, path = trial.intent, recipe_path(track.name)
    if all(repo.show(tip, p) == text for p, text in kept.files.items()):
        before = {p: repo.show(kept.parent, p) for p in kept.files}
        files = {p: text for p, text in before.items() if text is not None}
        return files, [p for p in before if p not in files]
    values, old = parse_recipe(repo.show(tip, path), track), parse_recipe(repo.show(kept.parent, path), track)
    for knob, value in trial.proposed.change.items():
        if values.get(knob) == value:
            values.pop(knob)
            values.update({knob: old[knob]} if knob in old else {})
    return {path: render_recipe(values, track)}, []


def _prepare_revert(
    repo: Repo, ledger: Ledger, track: Track, search: str, branch: str, trial: TrialState,
) -> RevertIntent:
    assert trial.intent and trial.done and trial.honest and trial.honest_ref
    tip = repo.rev(branch)
    assert tip
    files, removes = _undone(repo, track, trial, tip)
    honest, p, ref = trial.honest, trial.proposed, trial.honest_ref
    text = "\n".join([
        f"Revert {change_text(p.change, p.previous)}",
        "",
        f"Measured again on {len(honest.ks)} fresh seeds against its parent, the gain of {trial.id} is "
        f"{honest.gain:+.5f} bpb (standard error {honest.se:.5f}); its verdict had shown {honest.claimed:+.5f}.",
        "",
        f"{TRAILER_REVERTS}: {trial.id}",
        f"{TRAILER_HEAD}: {ref[0]}:{ref[1]}",
        "",
    ])
    plan = CommitPlan(repo.build_tree(tip, files, removes), tip, text, git_date(ref[2]))
    sha = repo.build_commit(plan)
    _pin(repo, revert_pin(trial.id, sha), sha)
    intent = RevertIntent(sha=sha, tree=plan.tree, parent=tip, branch=branch, message=text, date=plan.date, files=files,
                          removes=removes, reverts=trial.done.sha, reason="reverted.honest")
    ledger.append("revert.intent", intent, search=search, trial=trial.id)
    return intent


def _prepare(repo: Repo, ledger: Ledger, track: Track, search: str, branch: str, trial: TrialState) -> CommitIntent:
    assert trial.decided_ref
    parent = trial.proposed.parent_commit
    files = candidate_files(repo, track, parent, trial.proposed.change)
    plan = CommitPlan(repo.build_tree(parent, files), parent, message(trial), git_date(trial.decided_ref[2]))
    sha = repo.build_commit(plan)
    _pin(repo, trial.id, sha)
    intent = CommitIntent(sha=sha, tree=plan.tree, parent=parent, branch=branch, message=plan.message,
                          date=plan.date, files=files, config_hash=trial.proposed.config_hash)
    ledger.append("commit.intent", intent, search=search, trial=trial.id)
    return intent


def _rebuild(repo: Repo, trial: str, intent: CommitIntent) -> None:
    """Make sure that the object is there and pinned; the intent rebuilds it bit for bit."""
    if repo.rev(intent.sha) is None:
        tree = repo.build_tree(intent.parent, intent.files)
        sha = repo.build_commit(CommitPlan(tree, intent.parent, intent.message, intent.date))
        if sha != intent.sha:
            raise RuntimeError(f"trial {trial}: rebuilt commit {sha} is not the intended {intent.sha}")
    _pin(repo, trial, intent.sha)


def _pin(repo: Repo, trial: str, sha: str) -> None:
    """Keep the object from gc. A trial has one commit for ever: another under its id is somebody else's history."""
    there = repo.rev(PIN + trial)
    if there is None:
        repo.set_ref(PIN + trial, sha)
    elif there != sha:
        raise UserError(f"{PIN}{trial} already pins commit {there[:12]}: this ledger has lost the trial that made it. "
                        f"Restore the ledger (`git show refs/autoresearch/ledger:autoresearch.jsonl`), or use another "
                        f"--name; `git update-ref -d {PIN}{trial}` gives the old commit up")
