"""What the ledger says about one search, folded: the loop keeps no other memory, so a restart loses none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from agent.contract import PastTrial
from ledger.measured import HonestMeasured, RevertIntent, RevertVoid, TimingMeasured, TrialReverted
from ledger.records import (
    CommitDone,
    CommitIntent,
    CommitVoid,
    ControlEnded,
    Decided,
    Finding,
    PreflightPassed,
    PreflightRefused,
    RunFigures,
    SearchEnded,
    SearchStarted,
    StageEnded,
    TrialAbandoned,
    TrialFailed,
    TrialProposed,
)


@dataclass
class TrialState:
    """One trial's events so far."""

    id: str
    proposed: TrialProposed
    preflight: PreflightPassed | None = None
    runs: dict[str, dict[int, RunFigures]] = field(default_factory=lambda: {"breadth": {}, "confirm": {}})
    decided: Decided | None = None
    refused: PreflightRefused | None = None
    failed: TrialFailed | None = None
    abandoned: TrialAbandoned | None = None
    intent: CommitIntent | None = None
    done: CommitDone | None = None
    void: CommitVoid | None = None
    finding: Finding | None = None
    timing: list[list[float]] = field(default_factory=list)  # step ms of [incumbent, candidate], taking turns
    given_up_seconds: float = 0.0  # of breadth runs without an end, since this process began
    honest: HonestMeasured | None = None  # the last word on a keep
    honest_ref: tuple[int, str, str] | None = None  # seq, h, ts of it
    revert_intent: RevertIntent | None = None
    reverted: TrialReverted | None = None
    revert_void: RevertVoid | None = None
    decided_ref: tuple[int, str, str] | None = None  # seq, h, ts of the decided record

    @property
    def over(self) -> bool:
        """Nothing more will be measured for it (a keep may still owe its commit)."""
        return any((self.decided, self.refused, self.failed, self.abandoned))

    @property
    def owes_commit(self) -> bool:
        """Decided as a keep, and its commit is neither done nor void."""
        return bool(self.decided and self.decided.verdict == "keep" and not self.done and not self.void)

    @property
    def owes_revert(self) -> bool:
        """Kept, measured again, and found to be no gain; and it is not taken back yet."""
        wanted = (self.honest and self.honest.decision == "revert") or self.revert_intent
        return bool(wanted and not self.reverted)

    @property
    def stands(self) -> bool:
        """Kept, committed, and not taken back."""
        return bool(self.done and not self.reverted)

    @property
    def verdict(self) -> str:
        """keep | reject | failed | refused | abandoned | open. A keep that was taken back counts as a rejection."""
        if self.decided:
            return self.decided.verdict if not (self.void or self.reverted) else "reject"
        for word in ("refused", "failed", "abandoned"):
            if getattr(self, word):
                return word
        return "open"

    @property
    def reason(self) -> str:
        """The exact reason code, "" while open."""
        if self.reverted:
            return self.reverted.reason
        for event in (self.decided, self.refused, self.failed, self.abandoned):
            if event:
                return event.reason
        return ""


@dataclass
class SearchState:
    """One search (by name), as far as its ledger goes."""

    search: str
    started: list[SearchStarted] = field(default_factory=list)
    trials: dict[str, TrialState] = field(default_factory=dict)
    controls: dict[tuple[str, int, str, str], dict[int, RunFigures]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)  # trial ids, in order of commit
    seconds: float = 0.0  # worker-seconds spent
    ended: str = ""  # reason of the last end; "" while it runs, or after a kill

    @property
    def complete(self) -> bool:
        """It came to the end of a budget of its own, with nothing left to finish."""
        return self.ended in ("budget.trials", "budget.keeps") and self.open_trial is None

    @property
    def generation(self) -> int:
        """Keeps so far, also those taken back: each incumbent is measured on seeds of its own."""
        return len(self.kept)

    @property
    def standing(self) -> list[TrialState]:
        """Kept trials that were not taken back, in order of commit."""
        return [self.trials[t] for t in self.kept if self.trials[t].stands]

    @property
    def decided(self) -> int:
        """Trials that count against ``--trials``: judged, or failed by their own fault."""
        return sum(1 for t in self.trials.values() if t.decided or (t.failed and t.failed.reason != "failed.infra"))

    @property
    def next_number(self) -> int:
        """Number of the next trial, 1-based, over all proposals of the search."""
        return 1 + max((t.proposed.number for t in self.trials.values()), default=0)

    @property
    def open_trial(self) -> TrialState | None:
        """The trial that a stop or kill left unfinished, if any (at most one)."""
        return next((t for t in self.trials.values() if not t.over), None)

    def control_runs(self, stage: str, generation: int, config: str, fingerprint: str) -> dict[int, RunFigures]:
        """Runs of one incumbent under one fingerprint, by k."""
        return self.controls.setdefault((stage, generation, config, fingerprint), {})

    def past(self, fingerprint: str) -> tuple[PastTrial, ...]:
        """History in the shape that proposers read."""
        out = []
        for t in self.trials.values():
            if not t.over or t.abandoned:
                continue
            p = t.proposed
            out.append(PastTrial(
                trial=t.id, line=p.line, move=p.move, change=p.change, previous=p.previous,
                parent_config=p.parent_config, config_hash=p.config_hash, verdict=t.verdict, reason=t.reason,
                delta_bpb=measured_delta(t), same_fingerprint=p.fingerprint == fingerprint,
            ))
        return tuple(out)

    def tried(self, fingerprint: str) -> frozenset[str]:
        """Configuration hashes already judged under this fingerprint: a repeat would learn nothing."""
        return frozenset(
            t.proposed.config_hash for t in self.trials.values()
            if t.over and not t.abandoned and t.proposed.fingerprint == fingerprint and t.reason != "failed.infra"
        )


def measured_delta(trial: TrialState) -> float | None:
    """Candidate minus incumbent, bpb: on fresh seeds where a keep was measured again, else as judged."""
    if trial.honest:
        return -trial.honest.gain
    return trial.decided.delta_bpb if trial.decided else None


def fold(records: Iterable[Any], search: str) -> SearchState:
    """Fold ledger records (``ledger.store.Record``: .type, .search, .trial, .body, .seq, .h, .ts)."""
    state = SearchState(search)
    for r in records:
        if r.search == search:
            apply(state, r)
    return state


def apply(state: SearchState, r: Any) -> None:
    """Fold one more record of the search into ``state``."""
    body = r.body
    if isinstance(body, SearchStarted):
        state.started.append(body)
        state.ended = ""
    elif isinstance(body, SearchEnded):
        state.ended = body.reason
    elif isinstance(body, ControlEnded):
        runs = state.control_runs(body.stage, body.generation, body.config_hash, body.fingerprint)
        runs[body.run.k] = body.run
        state.seconds += body.run.wall_seconds
    elif isinstance(body, TrialProposed):
        state.trials[r.trial] = TrialState(r.trial, body)
    elif r.trial in state.trials:
        _apply_to_trial(state, state.trials[r.trial], r)


def _apply_to_trial(state: SearchState, trial: TrialState, r: Any) -> None:
    body = r.body
    if isinstance(body, StageEnded):
        trial.runs[r.type.partition(".")[0]][body.run.k] = body.run
        state.seconds += body.run.wall_seconds
    elif isinstance(body, PreflightPassed):
        trial.preflight = body
        state.seconds += body.seconds
        if body.control_step_ms > 0.0:
            trial.timing = [[body.control_step_ms, body.step_ms]]
    elif isinstance(body, PreflightRefused):
        trial.refused = body
        state.seconds += body.seconds
    elif isinstance(body, Decided):
        trial.decided, trial.decided_ref = body, (r.seq, r.h, r.ts)
    elif isinstance(body, TrialFailed):
        trial.failed = body
        state.seconds += body.cost_seconds
    elif isinstance(body, TrialAbandoned):
        trial.abandoned = body
    elif isinstance(body, CommitIntent):
        trial.intent = body
    elif isinstance(body, CommitDone):
        trial.done = body
        if trial.id not in state.kept:
            state.kept.append(trial.id)
    elif isinstance(body, CommitVoid):
        trial.void = body
    elif isinstance(body, Finding):
        trial.finding = body
    elif isinstance(body, TimingMeasured):
        trial.timing = body.pairs
        state.seconds += body.seconds
    else:
        _apply_after_keep(trial, r)


def _apply_after_keep(trial: TrialState, r: Any) -> None:
    body = r.body
    if isinstance(body, HonestMeasured):
        trial.honest, trial.honest_ref = body, (r.seq, r.h, r.ts)
    elif isinstance(body, RevertIntent):
        trial.revert_intent = body
    elif isinstance(body, TrialReverted):
        trial.reverted = body
    elif isinstance(body, RevertVoid):
        trial.revert_intent, trial.revert_void = None, body  # the branch had moved: planned again on its new tip
