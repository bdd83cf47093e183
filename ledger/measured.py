"""Records of measurements beside a trial's own runs: timing, honesty after a keep, calibration, panels, transfer.

Part of the one declaration in ``ledger.records``; a file of its own only for length. All gains and
differences are in bpb, positive = the candidate is better.
"""

from __future__ import annotations

from ledger.body import Body, Knobs


class TimingMeasured(Body, frozen=True):
    """Step times of incumbent and candidate, measured alternately (or side by side) on one machine."""

    pairs: list[list[float]]  # [control ms, candidate ms], in order; all that the trial has so far
    steps: int  # optimizer steps of each timing run
    seconds: float  # worker-seconds of the runs of this record


class HonestMeasured(Body, frozen=True):
    """A kept change measured again on seeds that its selection never saw, against its parent on the same seeds."""

    sha: str  # the kept commit
    generation: int  # of the seeds: keeps so far, this one included
    parent_config: str
    config_hash: str
    ks: list[int]
    differences: list[float]  # parent - kept, per seed
    gain: float  # their mean
    se: float
    claimed: float  # the gain that its verdict showed
    floor: float  # reverted when the mean over all fresh pairs lies below this
    fingerprint: str  # of the runs
    last: bool  # no more seeds would be added
    decision: str  # stand | extend | revert


class RevertIntent(Body, frozen=True):
    """Everything needed to rebuild the commit that takes a keep back. Fields as in ``commit.intent``."""

    sha: str
    tree: str
    parent: str
    branch: str
    message: str
    date: str
    files: dict[str, str]
    reverts: str  # the kept commit
    reason: str  # reverted.honest | reverted.person
    removes: list[str] = []  # paths that the parent did not have


class TrialReverted(Body, frozen=True):
    """The keep of this trial is taken back; the branch holds ``sha``, whose recipe is the parent's again."""

    sha: str
    branch: str
    reverts: str
    reason: str
    recovered: bool = False


class RevertVoid(Body, frozen=True):
    """The branch had moved: the revert was not made."""

    sha: str
    reason: str


class EditNoise(Body, frozen=True):
    """Same-seed differences between the incumbent and one edit."""

    change: Knobs
    differences: list[float]
    sigma_d: float


class CalibrationMeasured(Body, frozen=True):
    """What repeated runs of one incumbent say about the noise of a track on this machine."""

    track: str
    fingerprint: str
    fingerprint_parts: dict[str, str]
    stage: str
    config_hash: str
    commit: str
    seeds: list[int]
    values: list[float]  # val_bpb of the incumbent, by seed
    sigma_run: float
    same_seed: list[float]  # val_bpb of one seed, repeated
    bitwise: bool  # the repetition gave the same artifact, bit for bit
    edits: list[EditNoise]
    sigma_d: float  # pooled over the edits
    correlation: float  # of same-seed runs, measured over all edits
    correlation_low: float  # 90% interval
    correlation_high: float
    step_ms_spread_pct: float  # standard deviation of step time over its mean, equal code
    bytes_spread: int  # largest - smallest artifact over the seeds
    seconds: float  # worker-seconds spent on this
    environment: dict[str, str] = {}  # of the machine, as in search.started


class PanelLength(Body, frozen=True):
    """How breadth of one length ranked the panel."""

    steps: int
    gains: list[float]  # per configuration, mean over its pairs, dev slice
    tau: float  # Kendall's, against confirm
    tau_low: float  # 90% bootstrap interval
    tau_high: float
    false_kill: float  # share of the truly better configurations that the policy's veto rejects
    true_kill: float  # share of the truly worse ones
    seconds: float  # mean worker-seconds of a run


class PanelMeasured(Body, frozen=True):
    """A panel of configurations measured at breadth and at confirm: does the cheap look predict the dear one?"""

    track: str
    fingerprint: str
    config_hash: str  # of the incumbent that all are compared with
    changes: list[Knobs]
    confirm_gains: list[float]
    confirm_pairs: int
    breadth_pairs: int
    lengths: list[PanelLength]
    seconds: float


class TrackDerived(Body, frozen=True):
    """A measurement protocol grown from another; its numbers are its own."""

    track: str
    base: str
    changes: dict[str, str]  # field -> "old -> new"
    base_protocol: str  # hash
    protocol: str
    why: str


class TransferMeasured(Body, frozen=True):
    """Does a change hold on another track? Candidate and incumbent, measured there, seed by seed."""

    subject: str  # a trial id, or "stack of SEARCH"
    change: Knobs  # against the base on the target track
    source_track: str
    source_fingerprint: str
    source_gain: float | None
    track: str
    fingerprint: str
    base_config: str
    config_hash: str
    ks: list[int]
    differences: list[float]
    gain: float
    se: float
    low: float  # 90% interval of the gain
    high: float
    delta_bytes: int
    delta_step_pct: float
    verdict: str  # transfers | reverses | unclear
    seconds: float
