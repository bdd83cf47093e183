"""Made-up but plausible bodies of every event type, and a small search written with them."""

from __future__ import annotations

from typing import Any

import msgspec

from ledger.measured import (
    CalibrationMeasured,
    EditNoise,
    HonestMeasured,
    PanelLength,
    PanelMeasured,
    RevertIntent,
    RevertVoid,
    TimingMeasured,
    TrackDerived,
    TransferMeasured,
    TrialReverted,
)
from ledger.records import (
    Body,
    CommitDone,
    CommitIntent,
    CommitVoid,
    ControlEnded,
    Decided,
    Finding,
    Genesis,
    Look,
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
    SubCheck,
    TrialAbandoned,
    TrialFailed,
    TrialProposed,
)
from ledger.store import Ledger

BASE = "b" * 40
FINGERPRINT = "f" * 64


def figures(run_id: str = "run-1", **changes: Any) -> RunFigures:
    made = RunFigures(
        run_id=run_id,
        seed=11,
        k=0,
        val_bpb=2.25,
        val_loss=5.1,
        artifact_bytes=500_000,
        code_bytes=40_000,
        artifact_sha256="a" * 64,
        train_seconds=20.5,
        eval_seconds=2.0,
        wall_seconds=24.0,
        step_ms=85.0,
        steps=240,
        tokens=491_520,
        params=700_000,
        peak_memory_bytes=400_000_000,
        final_train_loss=4.9,
        split="val",
        eval_tokens=100_000,
        eval_bytes=270_000,
        tree_hash="c" * 40,
        evaluator_hash="d" * 64,
        data_fingerprint="e" * 64,
    )
    return msgspec.structs.replace(made, **changes)


def proposed(number: int = 1, parent: str = BASE, **changes: Any) -> TrialProposed:
    made = TrialProposed(
        number=number,
        kind="knobs",
        agent="garden",
        line="optimizer",
        hypothesis="a longer memory of the second moment steadies the embeddings",
        change={"beta2": 0.99},
        previous={"beta2": 0.95},
        predicted={"val_bpb": -0.01},
        falsified_by="no gain over four pairs",
        pages=["research_tracks.md#optimizer"],
        records=[],
        config_hash=f"config-{number}",
        proposal_hash=f"proposal-{number}",
        parent_commit=parent,
        parent_config="config-0",
        generation=0,
        fingerprint=FINGERPRINT,
        cost_usd=0.02,
        tokens=1200,
    )
    return msgspec.structs.replace(made, **changes)


LOOK = Look(
    n=2, mean=0.01, se=0.002, sigma=0.003, df=9.0, boundary=2.2, futility=0.0, lower=0.0056, decision="keep"
)


def decided(verdict: str = "keep", candidate: float = 2.24, control: float = 2.25, **changes: Any) -> Decided:
    made = Decided(
        verdict=verdict,
        reason="kept.gain" if verdict == "keep" else "rejected.noise",
        explanation="four pairs, all better",
        policy_hash="9" * 64,
        policy={"alpha": 0.05, "looks": [2, 4]},
        stage="confirm",
        control=[figures("control", val_bpb=control)],
        candidate=[figures("candidate", val_bpb=candidate)],
        noise_prior={"sigma": 0.003, "df": 8.0},
        looks=[LOOK],
        checks=[SubCheck(name="bytes", passed=True, detail="540,000 of 1,000,000")],
        delta_bpb=candidate - control,
        delta_bytes=-120,
        delta_step_pct=0.4,
        sigma=0.003,
        sigma_df=9.0,
        cost_seconds=120.0,
    )
    return msgspec.structs.replace(made, **changes)


def search_started(**changes: Any) -> SearchStarted:
    made = SearchStarted(
        track="pocket",
        fingerprint=FINGERPRINT,
        fingerprint_parts={"data": "e" * 64},
        policy_hash="9" * 64,
        agent="garden",
        seed=1,
        branch="search/night",
        incumbent_commit=BASE,
        incumbent_config="config-0",
        code_tree="c" * 40,
    )
    return msgspec.structs.replace(made, **changes)


def control(commit: str = BASE, bpb: float = 2.25, k: int = 0, **changes: Any) -> ControlEnded:
    made = ControlEnded(
        stage="confirm",
        generation=0,
        incumbent_commit=commit,
        config_hash="config-0",
        fingerprint=FINGERPRINT,
        run=figures(f"control-{commit[:4]}-{k}", val_bpb=bpb, k=k),
    )
    return msgspec.structs.replace(made, **changes)


def intent(sha: str = "1" * 40, parent: str = BASE) -> CommitIntent:
    return CommitIntent(
        sha=sha,
        tree="7" * 40,
        parent=parent,
        branch="search/night",
        message="keep t1: beta2 0.99\n\nTrial: t1\n",
        date="1790000000 +0000",
        files={"trainer/recipes/pocket.toml": "beta2 = 0.99\n"},
        config_hash="config-1",
    )


def passed() -> PreflightPassed:
    return PreflightPassed(
        seconds=3.0,
        artifact_bytes=500_000,
        code_bytes=40_000,
        predicted_bytes=560_000,
        cap_bytes=1_000_000,
        step_ms=86.0,
        checks=["roundtrip"],
    )


EVERY: dict[str, Body] = {
    "ledger.genesis": Genesis(schema=1),
    "ledger.repair": Repair(torn_bytes=2, torn_hex="7b22", sha256="0" * 64),
    "search.started": search_started(),
    "search.ended": SearchEnded(reason="budget.trials", decided=3, kept=1, seconds=3600.0),
    "noise.measured": NoiseMeasured(
        stage="confirm", sigma_unpaired=0.01, n=2, values=[2.25, 2.26], source="controls"
    ),
    "control.ended": control(),
    "trial.proposed": proposed(),
    "preflight.passed": passed(),
    "preflight.refused": PreflightRefused(reason="rejected.duplicate", detail="as t1"),
    "breadth.started": StageStarted(k=0, seed=5, run_id="b-0"),
    "breadth.ended": StageEnded(run=figures("b-0", split="dev")),
    "confirm.started": StageStarted(k=0, seed=11, run_id="c-0"),
    "confirm.ended": StageEnded(run=figures("c-0")),
    "decided": decided(),
    "commit.intent": intent(),
    "commit.done": CommitDone(sha="1" * 40, branch="search/night"),
    "commit.void": CommitVoid(sha="1" * 40, reason="the branch has moved"),
    "trial.failed": TrialFailed(reason="failed.nan", stage="breadth", detail="loss is not finite at step 40"),
    "trial.abandoned": TrialAbandoned(reason="stopped"),
    "timing.measured": TimingMeasured(pairs=[[100.0, 110.5], [101.0, 111.0]], steps=10, seconds=12.5),
    "honest.measured": HonestMeasured(
        sha="1" * 40, generation=1, parent_config="p" * 64, config_hash="c" * 64, ks=[0, 1], differences=[0.01, -0.02],
        gain=-0.005, se=0.015, claimed=0.02, floor=0.0, fingerprint=FINGERPRINT, last=False,
        decision="extend",
    ),
    "revert.intent": RevertIntent(
        sha="2" * 40, tree="3" * 40, parent="1" * 40, branch="refs/heads/search/night", message="Revert",
        date="1 +0000", files={"trainer/recipes/pocket.toml": ""}, reverts="1" * 40, reason="reverted.honest",
    ),
    "trial.reverted": TrialReverted(
        sha="2" * 40, branch="refs/heads/search/night", reverts="1" * 40, reason="reverted.honest"
    ),
    "revert.void": RevertVoid(sha="2" * 40, reason="the branch has moved"),
    "calibration.measured": CalibrationMeasured(
        track="pocket", fingerprint=FINGERPRINT, fingerprint_parts={"data": "d"}, stage="confirm", config_hash="c" * 64,
        commit=BASE, seeds=[1, 2], values=[2.5, 2.51], sigma_run=0.007, same_seed=[2.5, 2.5], bitwise=True,
        edits=[EditNoise(change={"beta2": 0.99}, differences=[0.001, 0.003], sigma_d=0.0014)], sigma_d=0.0014,
        correlation=0.9, correlation_low=0.8, correlation_high=0.95, step_ms_spread_pct=3.0, bytes_spread=900,
        seconds=120.0,
    ),
    "panel.measured": PanelMeasured(
        track="pocket", fingerprint=FINGERPRINT, config_hash="c" * 64, changes=[{"beta2": 0.99}], confirm_gains=[0.001],
        confirm_pairs=4, breadth_pairs=2, seconds=600.0,
        lengths=[PanelLength(steps=60, gains=[0.002], tau=0.5, tau_low=0.1, tau_high=0.8, false_kill=0.1,
                             true_kill=0.6, seconds=12.0)],
    ),
    "track.derived": TrackDerived(
        track="pocket-2x", base="pocket", changes={"confirm_steps": "120 -> 240"}, base_protocol="a" * 64,
        protocol="b" * 64, why="does it last?",
    ),
    "transfer.measured": TransferMeasured(
        subject="t1", change={"beta2": 0.99}, source_track="pocket", source_fingerprint=FINGERPRINT, source_gain=0.01,
        track="pocket-2x", fingerprint="e" * 64, base_config="p" * 64, config_hash="c" * 64, ks=[0, 1],
        differences=[0.01, 0.012], gain=0.011, se=0.001, low=0.009, high=0.013, delta_bytes=-10, delta_step_pct=0.5,
        verdict="transfers", seconds=200.0,
    ),
    "finding": Finding(
        line="optimizer", move="bracket", predicted_bpb=-0.01, measured_bpb=None, lesson="größer ≠ besser"
    ),
    "note": Note(text="a person's remark: \"quotes\", \\, \n newline, ü, 漢字, \U0001f600"),
}


def run_trial(
    ledger: Ledger,
    trial: str,
    number: int,
    verdict: Decided | None = None,
    search: str = "night",
    sha: str = "",
    **changes: Any,
) -> None:
    """Append a whole, lawful trial: proposed to decided, and its commit if kept."""
    proposal = proposed(number, **changes)

    def put(type: str, body: Body) -> None:
        ledger.append(type, body, search=search, trial=trial)

    put("trial.proposed", proposal)
    put("preflight.passed", passed())
    for stage in ("breadth", "confirm"):
        run_id = f"{trial}-{stage}"
        put(f"{stage}.started", StageStarted(k=0, seed=3, run_id=run_id))
        put(f"{stage}.ended", StageEnded(run=figures(run_id)))
    if verdict is None:
        return
    put("decided", verdict)
    if verdict.verdict == "keep" and sha:
        put("commit.intent", intent(sha, proposal.parent_commit))
        put("commit.done", CommitDone(sha=sha, branch="search/night"))


def fill(ledger: Ledger, count: int) -> None:
    """``count`` notes, of varied length."""
    for index in range(count):
        note = Note(text=f"note {index} " + "x" * (index * 7 % 40))
        ledger.append("note", note, search="s", trial=f"t{index}")
