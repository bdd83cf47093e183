"""The stages of a trial: controls, preflight, breadth, confirm, decision. Each may be resumed from the ledger."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.bench import Bench, infra_stop
from harness.errors import UserError
from harness.executor import RunDone, RunFailed
from harness.gate import noise
from harness.gate.verdict import breadth_verdict, confirm_step
from harness.recipe import parse_recipe
from harness.state import TrialState
from harness.transaction import candidate_files
from harness.workspace import recipe_path
from ledger.records import (
    ControlEnded,
    Decided,
    Finding,
    NoiseMeasured,
    PreflightPassed,
    PreflightRefused,
    RunFigures,
    StageEnded,
    StageStarted,
    TrialFailed,
)
from trainer.knobs import REGISTRY, KnobValue

PREFLIGHT_STEPS = 2
BYTE_SLACK = 0.02  # preflight refuses only above cap * (1 + slack): the gate judges the real artifact


@dataclass(frozen=True)
class Incumbent:
    """The tip of the search branch, resolved."""

    commit: str
    knobs: dict[str, KnobValue]
    config: str


def incumbent(bench: Bench) -> Incumbent:
    """Read the incumbent from the search branch."""
    commit = bench.repo.rev(bench.branch)
    if commit is None:
        raise UserError(f"{bench.branch.removeprefix('refs/heads/')} was deleted while the search ran; start the "
                        "search again: it says how to bring the branch back")
    recipe = parse_recipe(bench.repo.show(commit, recipe_path(bench.track.name)), bench.track)
    knobs = bench.track.resolve(recipe)
    return Incumbent(commit, knobs, REGISTRY.config_hash(knobs))


def ensure_controls(bench: Bench, inc: Incumbent, stage: str, count: int) -> dict[int, RunFigures]:
    """Runs 0..count-1 of the incumbent on this stage's seed list; missing ones are made now."""
    runs = bench.state.control_runs(stage, bench.state.generation, inc.config, bench.fingerprint)
    missing = [k for k in range(count) if k not in runs]
    requests = [
        bench.request(owner=f"control-{inc.config[:8]}", stage=stage, k=k, knobs=dict(inc.knobs), commit=inc.commit,
                      files={})
        for k in missing
    ]

    def done(outcome: RunDone) -> None:
        bench.write("control.ended", ControlEnded(
            stage=stage, generation=bench.state.generation, incumbent_commit=inc.commit, config_hash=inc.config,
            fingerprint=bench.fingerprint, run=outcome.figures))

    for i in range(0, len(requests), bench.executor.workers):
        bench.check_stop()
        bench.view.status.doing = f"measuring the incumbent: {stage} controls"
        infra_stop(bench.wave(requests[i:i + bench.executor.workers], done))
    if missing and stage == "confirm" and len(runs) > 1:
        values = [runs[k].val_bpb for k in sorted(runs)]
        bench.write("noise.measured", NoiseMeasured(
            stage=stage, sigma_unpaired=statistics.stdev(values), n=len(values), values=values,
            source=f"controls of {inc.commit[:12]}, generation {bench.state.generation}"))
    return runs


def preflight(bench: Bench, trial: TrialState, inc: Incumbent) -> bool:
    """A two-step run all the way to a score, and predictions. True when the trial may go on."""
    bench.view.status.doing = f"{trial.id}: preflight"
    begin = time.monotonic()
    change = dict(trial.proposed.change)
    knobs = {**inc.knobs, **change}
    files = candidate_files(bench.repo, bench.track, inc.commit, change)
    request = bench.request(owner=trial.id, stage="preflight", k=0, knobs=knobs, commit=inc.commit, files=files,
                            steps=PREFLIGHT_STEPS)
    done: list[RunDone] = []
    failures = bench.wave([request], done.append)
    seconds = time.monotonic() - begin
    if failures:
        fail(bench, trial, "preflight", failures[0])
        return False
    run = done[0].figures
    controls = bench.state.control_runs("confirm", bench.state.generation, inc.config, bench.fingerprint)
    predicted = predict_bytes(run, list(controls.values()))
    problem = _preflight_problem(bench, run, predicted)
    if problem:
        bench.write("preflight.refused", PreflightRefused(reason=problem[0], detail=problem[1], seconds=seconds),
                    trial.id)
        return False
    bench.write("preflight.passed", PreflightPassed(
        seconds=seconds, artifact_bytes=run.artifact_bytes, code_bytes=run.code_bytes, predicted_bytes=predicted,
        cap_bytes=bench.track.cap_bytes, step_ms=run.step_ms,
        checks=["schema", "ranges", "not a repeat", "train", "export", "reload in a clean process", "score",
                "predicted bytes", "step time", "memory"],
    ), trial.id)
    return True


def predict_bytes(run: RunFigures, controls: Sequence[RunFigures]) -> int:
    """Total bytes of the candidate's confirm artifact: the incumbent's worst bytes per parameter times its parameters.

    A two-step run compresses far better than a trained one, so its own artifact only bounds from below.
    """
    ratio = max((c.artifact_bytes / c.params for c in controls), default=run.artifact_bytes / run.params)
    return run.code_bytes + max(run.artifact_bytes, round(ratio * run.params))


def _preflight_problem(bench: Bench, run: RunFigures, predicted: int) -> tuple[str, str] | None:
    track = bench.track
    if predicted > track.cap_bytes * (1 + BYTE_SLACK):
        return "rejected.bytes", (f"predicted {predicted:,} bytes (code {run.code_bytes:,}), over the track's cap of "
                                  f"{track.cap_bytes:,} by more than {BYTE_SLACK:.0%}")
    if run.step_ms > 1000 * track.step_time_limit_s:
        return "rejected.runtime", f"{run.step_ms:.0f} ms a step; the track allows {1000 * track.step_time_limit_s:.0f}"
    if run.peak_memory_bytes > track.memory_limit_bytes:
        return "rejected.runtime", (f"{run.peak_memory_bytes:,} bytes of memory; the track allows "
                                    f"{track.memory_limit_bytes:,}")
    return None


def fail(bench: Bench, trial: TrialState, stage: str, failure: RunFailed) -> None:
    """Close a trial whose run failed. The machine's failures are named so, and never held against the idea."""
    bench.write("trial.failed", TrialFailed(
        reason=f"failed.{failure.kind}", stage=stage, detail=failure.detail, run_id=failure.request.run_id,
        log_tail=failure.log_tail[-4000:], cost_seconds=failure.wall_seconds), trial.id)


def measure(bench: Bench, trial: TrialState, inc: Incumbent, stage: str, wanted: Sequence[int]) -> bool:
    """Make the candidate's runs ``wanted`` (by k) of a stage that are not in the ledger yet."""
    runs = trial.runs[stage]
    change = dict(trial.proposed.change)
    files = candidate_files(bench.repo, bench.track, inc.commit, change)
    requests = [
        bench.request(owner=trial.id, stage=stage, k=k, knobs={**inc.knobs, **change}, commit=inc.commit, files=files)
        for k in wanted if k not in runs
    ]
    for i in range(0, len(requests), bench.executor.workers):
        bench.check_stop()
        batch = requests[i:i + bench.executor.workers]
        for r in batch:
            bench.write(f"{stage}.started", StageStarted(k=r.k, seed=r.seed, run_id=r.run_id), trial.id)
        bench.view.status.doing = f"{trial.id}: {stage}"
        failures = bench.wave(
            batch, lambda d: bench.write(f"{stage}.ended", StageEnded(run=d.figures), trial.id))
        if failures:
            fail(bench, trial, stage, failures[0])
            return False
    return True


def breadth(bench: Bench, trial: TrialState, inc: Incumbent) -> bool:
    """The cheap look, on the dev slice; it can only veto. True when the trial goes on to confirm."""
    pairs = range(bench.policy.breadth_pairs)
    control = ensure_controls(bench, inc, "breadth", len(pairs))
    if not measure(bench, trial, inc, "breadth", pairs):
        return False
    sides = [control[k] for k in pairs], [trial.runs["breadth"][k] for k in pairs]
    prior = noise.pool_decided(bench.policy, history(bench))
    verdict = breadth_verdict(bench.policy, *sides, prior, cost_seconds=cost(trial))
    if verdict.decided is None:
        return True
    decide(bench, trial, verdict.decided)
    return False


def confirm(bench: Bench, trial: TrialState, inc: Incumbent) -> None:
    """Group-sequential paired runs until the gate decides."""
    policy = bench.policy
    control = ensure_controls(bench, inc, "confirm", policy.controls)
    prior = noise.pool_decided(policy, history(bench))
    want = policy.looks[0]
    while True:
        # An idle worker runs the next pair ahead; the gate still looks at the pairs in their order.
        ahead = -(-want // bench.executor.workers) * bench.executor.workers
        wanted = range(min(ahead, policy.looks[-1]))
        control = ensure_controls(bench, inc, "confirm", max(policy.controls, len(wanted)))
        if not measure(bench, trial, inc, "confirm", wanted):
            return
        body = confirm_step(policy, list(control.values()), list(trial.runs["confirm"].values()), prior,
                            bench.track.cap_bytes, cost_seconds=cost(trial))
        if body.verdict != "continue":
            decide(bench, trial, body)
            return
        want = body.needed_pairs


def decide(bench: Bench, trial: TrialState, body: Decided) -> None:
    """Log the verdict, then the finding: prediction against outcome."""
    bench.write("decided", body, trial.id)
    predicted = trial.proposed.predicted.get("val_bpb")
    bench.write("finding", finding(trial, body, predicted), trial.id)


def finding(trial: TrialState, body: Decided, predicted: float | None) -> Finding:
    """What this trial taught, in one sentence."""
    measured = body.delta_bpb
    what = ", ".join(f"{k}={v}" for k, v in trial.proposed.change.items())
    if measured is None:
        lesson = f"{what}: {body.reason}"
    elif predicted is None:
        lesson = f"{what}: measured {measured:+.4f} bpb ({body.reason})"
    else:
        agree = "as predicted in sign" if (predicted < 0) == (measured < 0) else "against the prediction"
        lesson = f"{what}: predicted {predicted:+.4f} bpb, measured {measured:+.4f} ({body.reason}), {agree}"
    return Finding(line=trial.proposed.line, move=trial.proposed.move, predicted_bpb=predicted, measured_bpb=measured,
                   lesson=lesson)


def history(bench: Bench) -> list[Decided]:
    """Verdicts under today's fingerprint that carry paired confirm runs: what the noise is pooled from."""
    return [
        t.decided for t in bench.state.trials.values()
        if t.decided and t.decided.stage == "confirm" and t.proposed.fingerprint == bench.fingerprint
    ]


def cost(trial: TrialState) -> float:
    """Worker-seconds of the candidate's own runs."""
    runs: list[Any] = [r for stage in trial.runs.values() for r in stage.values()]
    return round(sum(r.wall_seconds for r in runs) + (trial.preflight.seconds if trial.preflight else 0.0), 3)
