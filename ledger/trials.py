"""A trial's events folded into one view. Pure functions, no I/O.

``delta_*`` are candidate minus control, so that a negative ``delta_bpb`` is an improvement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import fmean

from ledger.decode import Record
from ledger.measured import HonestMeasured, TrialReverted
from ledger.records import (
    CommitDone,
    CommitIntent,
    CommitVoid,
    Decided,
    Finding,
    Knobs,
    PreflightPassed,
    PreflightRefused,
    RunFigures,
    SearchStarted,
    StageEnded,
    TrialAbandoned,
    TrialFailed,
    TrialProposed,
)

STATUSES = ("proposed", "running", "kept", "reverted", "rejected", "failed", "refused", "abandoned")


@dataclass(frozen=True, kw_only=True)
class TrialView:
    """One trial, its events folded. Figures are None (counts 0) where nothing was measured."""

    trial: str
    search: str
    track: str
    number: int
    agent: str
    line: str
    move: str
    kind: str
    hypothesis: str
    change: Knobs
    previous: Knobs
    parent_commit: str
    parent_config: str
    config_hash: str
    fingerprint: str
    generation: int
    proposed_at: str
    first_seq: int
    status: str = "proposed"  # one of STATUSES
    stage: str = ""  # preflight | breadth | confirm: how far it got
    reason: str = ""
    explanation: str = ""
    delta_bpb: float | None = None  # paired mean
    delta_bytes: int | None = None
    delta_step_pct: float | None = None
    sigma: float | None = None
    candidate_bpb: float | None = None  # mean over the confirm runs of the verdict
    control_bpb: float | None = None
    honest_gain: float | None = None  # of a keep, on fresh seeds against its parent; positive = better
    honest_se: float | None = None
    honest_pairs: int = 0
    pairs: int = 0
    bytes: int | None = None  # code + compressed weights, worst candidate run (of preflight, until then)
    commit: str = ""
    commit_state: str = ""  # "" | owed | intent | done | void | reverted
    revert: str = ""  # the commit that took the keep back
    lesson: str = ""
    runs: int = 0
    seconds: float = 0.0  # worker-seconds: the verdict's own account, else the sum over ended runs
    cost_usd: float = 0.0
    tokens: int = 0  # of the agent
    retry_of: str = ""
    ended_at: str = ""

    @property
    def settled(self) -> bool:
        """Whether the trial is over."""
        return self.status not in ("proposed", "running")


def trials(records: Iterable[Record], search: str | None = None) -> list[TrialView]:
    """Every trial in the order of its proposal."""
    views: dict[tuple[str, str], TrialView] = {}
    tracks: dict[str, str] = {}
    for record in records:
        if isinstance(record.body, SearchStarted):
            tracks[record.search] = record.body.track
        if not record.trial or (search is not None and record.search != search):
            continue
        key = (record.search, record.trial)
        if isinstance(record.body, TrialProposed):
            if key not in views:
                views[key] = _propose(record, record.body, tracks.get(record.search, ""))
        elif key in views:
            views[key] = _fold(views[key], record)
    return list(views.values())


def _propose(record: Record, body: TrialProposed, track: str) -> TrialView:
    return TrialView(
        trial=record.trial,
        search=record.search,
        track=track,
        number=body.number,
        agent=body.agent,
        line=body.line,
        move=body.move,
        kind=body.kind,
        hypothesis=body.hypothesis,
        change=body.change,
        previous=body.previous,
        parent_commit=body.parent_commit,
        parent_config=body.parent_config,
        config_hash=body.config_hash,
        fingerprint=body.fingerprint,
        generation=body.generation,
        proposed_at=record.ts,
        first_seq=record.seq,
        cost_usd=body.cost_usd,
        tokens=body.tokens,
        retry_of=body.retry_of,
    )


def _fold(view: TrialView, record: Record) -> TrialView:
    body = record.body
    if isinstance(body, PreflightPassed):
        size = body.artifact_bytes + body.code_bytes
        return replace(view, status="running", stage="preflight", bytes=size, seconds=view.seconds + body.seconds)
    if isinstance(body, StageEnded):
        seconds = view.seconds + body.run.wall_seconds
        return replace(view, stage=record.type.split(".")[0], runs=view.runs + 1, seconds=seconds)
    if record.type in ("breadth.started", "confirm.started"):
        return replace(view, status="running", stage=record.type.split(".")[0])
    if isinstance(body, PreflightRefused):
        return replace(
            view,
            status="refused",
            stage="preflight",
            reason=body.reason,
            explanation=body.detail,
            seconds=view.seconds + body.seconds,
            ended_at=record.ts,
        )
    if isinstance(body, TrialFailed):
        return replace(
            view,
            status="failed",
            stage=body.stage,
            reason=body.reason,
            explanation=body.detail,
            seconds=body.cost_seconds or view.seconds,
            ended_at=record.ts,
        )
    if isinstance(body, TrialAbandoned):
        return replace(view, status="abandoned", reason=body.reason, ended_at=record.ts)
    if isinstance(body, Decided):
        return _decide(view, record, body)
    if isinstance(body, Finding):
        return replace(view, lesson=body.lesson)
    return _commit(view, record)


def _decide(view: TrialView, record: Record, body: Decided) -> TrialView:
    # Whatever is not the word "keep" is no keep: an unknown verdict must never pass for one.
    kept = body.verdict == "keep"
    return replace(
        view,
        status="kept" if kept else "rejected",
        stage=body.stage,
        reason=body.reason,
        explanation=body.explanation,
        delta_bpb=body.delta_bpb,
        delta_bytes=body.delta_bytes,
        delta_step_pct=body.delta_step_pct,
        sigma=body.sigma,
        candidate_bpb=_mean(run.val_bpb for run in body.candidate),
        control_bpb=_mean(run.val_bpb for run in body.control),
        pairs=min(len(body.candidate), len(body.control)),
        bytes=max((total_bytes(run) for run in body.candidate), default=view.bytes),
        commit_state="owed" if kept else "",
        seconds=body.cost_seconds or view.seconds,
        ended_at=record.ts,
    )


def _commit(view: TrialView, record: Record) -> TrialView:
    body = record.body
    if isinstance(body, CommitIntent):
        return replace(view, commit=body.sha, commit_state="intent")
    if isinstance(body, CommitDone):
        return replace(view, commit=body.sha, commit_state="done")
    if isinstance(body, CommitVoid):
        return replace(
            view, status="abandoned", reason="commit.void", explanation=body.reason, commit="", commit_state="void"
        )
    if isinstance(body, HonestMeasured):
        return replace(view, honest_gain=body.gain, honest_se=body.se, honest_pairs=len(body.ks))
    if isinstance(body, TrialReverted):
        return replace(view, status="reverted", reason=body.reason, commit_state="reverted", revert=body.sha)
    return view


def total_bytes(run: RunFigures) -> int:
    """What the challenge counts: code plus compressed weights."""
    return run.artifact_bytes + run.code_bytes


def _mean(values: Iterable[float]) -> float | None:
    items = list(values)
    return fmean(items) if items else None


def select(
    views: Iterable[TrialView],
    *,
    status: str | None = None,
    knob: str | None = None,
    line: str | None = None,
    track: str | None = None,
    since: str | None = None,
) -> list[TrialView]:
    """Trials that match everything given; ``since`` compares RFC 3339 times of the proposal."""
    return [
        view
        for view in views
        if (status is None or view.status == status)
        and (knob is None or knob in view.change)
        and (line is None or view.line == line)
        and (track is None or view.track == track)
        and (since is None or view.proposed_at >= since)
    ]
