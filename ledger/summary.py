"""A record or a change in one line of plain words. No rich, no colours."""

from __future__ import annotations

from statistics import median

from ledger.decode import Record
from ledger.measured import (
    CalibrationMeasured,
    HonestMeasured,
    PanelMeasured,
    RevertIntent,
    RevertVoid,
    TimingMeasured,
    TrackDerived,
    TransferMeasured,
    TrialReverted,
)
from ledger.records import (
    CommitDone,
    CommitIntent,
    CommitVoid,
    ControlEnded,
    Decided,
    Finding,
    Genesis,
    NoiseMeasured,
    Note,
    PreflightPassed,
    PreflightRefused,
    Repair,
    RunFigures,
    SearchEnded,
    SearchStarted,
    StageEnded,
    StageStarted,
    TrialAbandoned,
    TrialFailed,
    TrialProposed,
)
from ledger.trials import TrialView


def signed(value: float, digits: int) -> str:
    """``+0.0123``, ``-1,204``: with sign and thousands separators."""
    return f"{value:+,.{digits}f}"


def change_text(item: TrialView | TrialProposed) -> str:
    """``beta2 0.95 → 0.99, depth 4 → 5``; for code, what kind of change it is."""
    if not item.change:
        return f"{item.kind}: {' '.join(item.hypothesis.split())}"
    return ", ".join(
        f"{knob} {_show(item.previous[knob])} → {_show(value)}" if knob in item.previous else f"{knob} = {_show(value)}"
        for knob, value in item.change.items()
    )


def _show(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def summarise(record: Record) -> str:
    """What the record says, in one line ("" never: an unknown kind shows its fields' names)."""
    return " ".join(_words(record).split())


def _words(record: Record) -> str:
    body = record.body
    if isinstance(body, TrialProposed):
        return f"{change_text(body)} [{body.agent}, {body.line}]"
    if isinstance(body, StageStarted):
        return f"seed {body.seed} (#{body.k}){f', attempt {body.attempt}' if body.attempt > 1 else ''}"
    if isinstance(body, StageEnded):
        return _run(body.run)
    if isinstance(body, ControlEnded):
        return f"{body.stage} of {body.incumbent_commit[:10]}: {_run(body.run)}"
    if isinstance(body, Decided):
        gain = "" if body.delta_bpb is None else f" {signed(body.delta_bpb, 4)} bpb:"
        return f"{body.verdict} {body.reason}:{gain} {body.explanation}"
    if isinstance(body, PreflightPassed):
        return f"{body.predicted_bytes:,} of {body.cap_bytes:,} bytes predicted, {body.step_ms:.0f} ms a step"
    if isinstance(body, PreflightRefused):
        return f"{body.reason}: {body.detail}"
    if isinstance(body, TrialFailed):
        return f"{body.reason} in {body.stage}: {body.detail}"
    if isinstance(body, TrialAbandoned):
        return body.reason
    if isinstance(body, CommitIntent | CommitDone | CommitVoid):
        return _commit(body)
    return _other(record)


def _other(record: Record) -> str:
    body = record.body
    if isinstance(body, SearchStarted):
        how = "resumed" if body.resumed else "new"
        return f"{how} on {body.track}, {body.agent}, from {body.incumbent_commit[:10]}"
    if isinstance(body, SearchEnded):
        return f"{body.reason}: {body.decided} decided, {body.kept} kept, {body.seconds / 60:.1f} min"
    if isinstance(body, NoiseMeasured):
        return f"{body.stage}: sigma {body.sigma_unpaired:.4f} from {body.n} runs ({body.source})"
    if isinstance(body, Finding):
        return body.lesson
    if isinstance(body, Note):
        return body.text
    if isinstance(body, Genesis):
        return f"schema {body.schema} {body.note}"
    if isinstance(body, Repair):
        return f"{body.torn_bytes} torn bytes cut off and kept{f' in {body.sidecar}' if body.sidecar else ''}"
    return _measured(record)


def _measured(record: Record) -> str:
    """Records of ``ledger.measured``, beside a trial's own runs."""
    body = record.body
    if isinstance(body, TrackDerived):
        changes = ", ".join(f"{k} {v}" for k, v in body.changes.items())
        return f"{body.track} from {body.base}: {changes or 'same protocol'} ({body.why})"
    if isinstance(body, TransferMeasured):
        there = "" if body.source_gain is None else f", {signed(body.source_gain, 4)} there"
        return (f"{body.subject} {body.verdict}, {body.source_track} to {body.track}: {signed(body.gain, 4)} bpb "
                f"({signed(body.low, 4)} to {signed(body.high, 4)}, {len(body.ks)} pairs{there})")
    if isinstance(body, CalibrationMeasured):
        same = "one seed repeats bit for bit" if body.bitwise else "one seed does not repeat bit for bit"
        return (f"{body.track} {body.stage}: sigma {body.sigma_run:.4f} over {len(body.seeds)} seeds, "
                f"{body.sigma_d:.4f} in pairs (correlation {body.correlation:.2f}), {same}")
    if isinstance(body, PanelMeasured):
        lengths = ", ".join(f"{x.steps} steps {x.tau:.2f}" for x in body.lengths)
        return (f"{body.track}: {len(body.changes)} configurations, Kendall tau of breadth against confirm: "
                f"{lengths or 'none measured'}")
    if isinstance(body, TimingMeasured):
        ratios = [100.0 * (x / c - 1.0) for c, x in body.pairs if c > 0]
        return f"{signed(median(ratios), 1) if ratios else '?'}% a step, {len(body.pairs)} pairs of {body.steps} steps"
    if isinstance(body, HonestMeasured):
        return (f"{body.decision}: {signed(body.gain, 4)} bpb on {len(body.ks)} fresh seeds (standard error "
                f"{body.se:.4f}), {signed(body.claimed, 4)} claimed")
    if isinstance(body, RevertIntent):
        return f"{body.sha[:10]} takes back {body.reverts[:10]}: {body.reason}"
    if isinstance(body, TrialReverted):
        return (f"{body.reverts[:10]} taken back by {body.sha[:10]}: {body.reason}"
                f"{', recovered' if body.recovered else ''}")
    if isinstance(body, RevertVoid):
        return f"{body.sha[:10]} void: {body.reason}"
    return ", ".join(body.__struct_fields__) or record.type


def _run(run: RunFigures) -> str:
    size = run.artifact_bytes + run.code_bytes
    return f"{run.val_bpb:.4f} bpb, {size:,} bytes, {run.wall_seconds:.0f} s, seed {run.seed} (#{run.k})"


def _commit(body: CommitIntent | CommitDone | CommitVoid) -> str:
    sha = body.sha[:10]
    if isinstance(body, CommitIntent):
        return f"{sha} on {body.parent[:10]}, {len(body.files)} files"
    if isinstance(body, CommitDone):
        return f"{sha} on {body.branch}{', recovered' if body.recovered else ''}"
    return f"{sha} void: {body.reason}"
