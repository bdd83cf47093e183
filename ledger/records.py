"""Every event of the ledger as a typed record: declared here, once.

``BODIES`` maps event type -> body struct; ``docs/contracts.md`` is rendered from it. A field never
changes its meaning; new fields carry defaults, so that old lines keep reading. Readers skip unknown
types and fields with a counted warning. Non-finite numbers cannot be written: say it with a status.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ledger.body import Body, Knobs
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

SCHEMA_VERSION = 1


class Writer(msgspec.Struct, frozen=True):
    """Who appended: host name, process id, boot id (tells a reused pid after a reboot)."""

    host: str
    pid: int
    boot: str


class Envelope(msgspec.Struct, frozen=True):
    """One line. ``h`` (SHA-256 over every byte before its key) ends the line; ``prev`` chains it."""

    v: int
    seq: int
    id: str  # UUIDv7
    type: str
    ts: str  # UTC, RFC 3339, microseconds
    writer: Writer
    search: str  # name of the search, "" when none
    trial: str  # trial id, "" when none
    body: msgspec.Raw
    prev: str  # h of the record before, 64 zeros at genesis
    h: str


class Genesis(Body, frozen=True):
    schema: int
    note: str = ""


class Repair(Body, frozen=True):
    """A torn tail was cut off. ``torn_hex`` carries the bytes; ``sidecar`` names their file if long."""

    torn_bytes: int
    torn_hex: str = ""
    sidecar: str = ""
    sha256: str = ""


class SearchStarted(Body, frozen=True):
    track: str
    fingerprint: str  # measurement fingerprint: numbers compare only within it
    fingerprint_parts: dict[str, str]
    policy_hash: str
    agent: str
    seed: int
    branch: str
    incumbent_commit: str
    incumbent_config: str  # configuration hash
    code_tree: str  # git tree of trainer/ without recipes
    resumed: bool = False
    budget: dict[str, float] = {}
    sandbox: str = "none"
    environment: dict[str, str] = {}


class SearchEnded(Body, frozen=True):
    reason: str  # budget.trials | budget.hours | budget.until | stopped | exhausted
    decided: int
    kept: int
    seconds: float


class RunFigures(Body, frozen=True):
    """One measured run: the trainer's figures and the referee's, side by side."""

    run_id: str
    seed: int
    k: int  # index in the seed list of its stage
    val_bpb: float  # referee's; on the dev slice for breadth, on val for confirm
    val_loss: float
    artifact_bytes: int
    code_bytes: int
    artifact_sha256: str
    train_seconds: float
    eval_seconds: float
    wall_seconds: float
    step_ms: float
    steps: int
    tokens: int
    params: int
    peak_memory_bytes: int
    final_train_loss: float
    split: str
    eval_tokens: int
    eval_bytes: int
    tree_hash: str
    evaluator_hash: str
    data_fingerprint: str
    attempt: int = 1
    fingerprint: str = ""  # under which it was measured; "": not recorded
    payload_bytes: int = 0  # the artifact before compression; 0: unknown
    dev: list[list[float]] = []  # [step, nats/token on the dev slice], as the trainer saw it on its way


class ControlEnded(Body, frozen=True):
    """A run of the incumbent: the other side of every pair."""

    stage: str  # breadth | confirm
    generation: int  # how many keeps lie behind this incumbent
    incumbent_commit: str
    config_hash: str
    fingerprint: str
    run: RunFigures


class TrialProposed(Body, frozen=True):
    number: int
    kind: str  # knobs | patch
    agent: str
    line: str  # research line of the knowledge base
    hypothesis: str
    change: Knobs  # knob -> new value (empty for a patch)
    previous: Knobs  # the incumbent's values of the same knobs
    predicted: dict[str, float]  # e.g. {"val_bpb": -0.01, "bytes": 0, "step_time": 0.0}
    falsified_by: str
    pages: list[str]  # knowledge-base pages relied on
    records: list[str]  # ledger ids and evidence ids relied on
    config_hash: str  # of the candidate, resolved
    proposal_hash: str
    parent_commit: str
    parent_config: str
    generation: int
    fingerprint: str
    move: str = ""
    retry_of: str = ""
    retry_because: str = ""
    tokens: int = 0
    cost_usd: float = 0.0
    latency_s: float = 0.0


class PreflightPassed(Body, frozen=True):
    seconds: float
    artifact_bytes: int
    code_bytes: int
    predicted_bytes: int
    cap_bytes: int
    step_ms: float
    checks: list[str]
    control_step_ms: float = 0.0  # the incumbent's, side by side with it; 0: not measured
    converged_bytes: int = 0  # predicted total of the same model trained for long; 0: not predicted


class PreflightRefused(Body, frozen=True):
    reason: str  # a reason code: rejected.duplicate | rejected.bytes | failed.export ...
    detail: str
    seconds: float = 0.0


class StageStarted(Body, frozen=True):
    k: int
    seed: int
    run_id: str
    attempt: int = 1


class StageEnded(Body, frozen=True):
    run: RunFigures


class SubCheck(Body, frozen=True):
    name: str
    passed: bool
    detail: str


class Look(Body, frozen=True):
    """One group-sequential look at the paired differences (control minus candidate; positive = better)."""

    n: int
    mean: float
    se: float
    sigma: float  # standard deviation of a difference used (shrunk)
    df: float
    boundary: float  # multiple of se
    futility: float
    lower: float  # mean - boundary * se
    decision: str  # keep | reject | continue


class EarlyStop(Body, frozen=True):
    """A breadth run that was given up on its way: dev loss too far above the incumbent's at the same step and seed."""

    k: int
    seed: int
    step: int
    of: int
    control: float  # nats/token
    candidate: float
    threshold: float  # candidate - control that is given up


class Decided(Body, frozen=True):
    verdict: str  # keep | reject
    reason: str  # kept.gain | rejected.worse | rejected.noise | rejected.immaterial | ...
    explanation: str
    policy_hash: str
    policy: dict[str, Any]  # the whole policy, so that the verdict is recomputed from this line
    stage: str  # preflight | breadth | confirm
    control: list[RunFigures] = []
    candidate: list[RunFigures] = []
    noise_prior: dict[str, float] = {}  # sigma, df, what went into it
    looks: list[Look] = []
    checks: list[SubCheck] = []
    delta_bpb: float | None = None  # candidate minus control, paired mean: negative is better
    delta_bytes: int | None = None
    delta_step_pct: float | None = None
    sigma: float | None = None
    sigma_df: float | None = None
    cost_seconds: float = 0.0  # worker-seconds spent on this trial
    cap_bytes: int = 0  # the track's cap that the worst seed was held against (0: bytes were not judged)
    timing: list[list[float]] = []  # step ms of [control, candidate], measured side by side
    converged_ratio: float = 0.0  # artifact bytes per payload byte of a model trained for long; 0: not judged
    converged_cap_bytes: int = 0  # cap that the converged prediction was held against
    simpler: int = 0  # settings that the candidate has fewer than the incumbent (negative: more)
    early: EarlyStop | None = None  # why breadth was not finished
    needed_timing: int = 0  # only in a "continue": timing pairs wanted before the verdict
    needed_pairs: int = 0  # only in a gate's "continue", which is never written: pairs of the next look


class CommitIntent(Body, frozen=True):
    """Everything needed to rebuild the commit object bit for bit."""

    sha: str
    tree: str
    parent: str
    branch: str
    message: str
    date: str  # "<unix seconds> +0000"
    files: dict[str, str]  # path -> whole new text
    config_hash: str


class CommitDone(Body, frozen=True):
    sha: str
    branch: str
    recovered: bool = False


class CommitVoid(Body, frozen=True):
    sha: str
    reason: str


class TrialFailed(Body, frozen=True):
    reason: str  # failed.crash | oom | nan | timeout | hang | export | infra (with the prefix "failed.")
    stage: str
    detail: str
    run_id: str = ""
    log_tail: str = ""
    cost_seconds: float = 0.0


class TrialAbandoned(Body, frozen=True):
    reason: str


class NoiseMeasured(Body, frozen=True):
    stage: str
    sigma_unpaired: float
    n: int
    values: list[float]
    source: str


class Finding(Body, frozen=True):
    """Prediction against outcome: what the trial taught."""

    line: str
    move: str
    predicted_bpb: float | None
    measured_bpb: float | None
    lesson: str
    predicted_bytes: int | None = None  # what preflight said the artifact and code would weigh
    measured_bytes: int | None = None  # the worst confirm run


class Note(Body, frozen=True):
    text: str


BODIES: dict[str, type[Body]] = {
    "ledger.genesis": Genesis,
    "ledger.repair": Repair,
    "search.started": SearchStarted,
    "search.ended": SearchEnded,
    "noise.measured": NoiseMeasured,
    "control.ended": ControlEnded,
    "trial.proposed": TrialProposed,
    "preflight.passed": PreflightPassed,
    "preflight.refused": PreflightRefused,
    "breadth.started": StageStarted,
    "breadth.ended": StageEnded,
    "confirm.started": StageStarted,
    "confirm.ended": StageEnded,
    "decided": Decided,
    "commit.intent": CommitIntent,
    "commit.done": CommitDone,
    "commit.void": CommitVoid,
    "trial.failed": TrialFailed,
    "trial.abandoned": TrialAbandoned,
    "timing.measured": TimingMeasured,
    "honest.measured": HonestMeasured,
    "revert.intent": RevertIntent,
    "trial.reverted": TrialReverted,
    "revert.void": RevertVoid,
    "calibration.measured": CalibrationMeasured,
    "panel.measured": PanelMeasured,
    "track.derived": TrackDerived,
    "transfer.measured": TransferMeasured,
    "finding": Finding,
    "note": Note,
}

TERMINAL = ("decided", "trial.failed", "trial.abandoned", "preflight.refused")
"""Events after which a trial is over, except that a ``decided`` keep still owes its commit."""
