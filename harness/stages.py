"""The stages of a trial: controls, preflight, breadth, confirm, decision. Each may be resumed from the ledger."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from harness.bench import Bench, OnDone, infra_stop
from harness.errors import UserError
from harness.executor import RunDone, RunFailed, RunRequest, dev_point
from harness.gate.correlation import noise_before
from harness.gate.early import stops
from harness.gate.policy import Policy
from harness.gate.verdict import Converged, Facts, breadth_verdict, confirm_step, early_verdict
from harness.recipe import parse_recipe
from harness.state import TrialState
from harness.tracks import Track
from harness.transaction import candidate_files
from harness.workspace import recipe_path
from ledger.measured import TimingMeasured
from ledger.records import (
    ControlEnded,
    Decided,
    EarlyStop,
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

TRIALS_A_BLOCK = 8  # judged on one block of controls before another is begun
BYTE_SLACK = 0.02  # preflight refuses only above cap * (1 + slack)


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


def controls(bench: Bench, inc: Incumbent, stage: str) -> dict[int, RunFigures]:
    """The runs of an incumbent on today's seed list of a stage, by k: its control bank."""
    return bench.state.control_runs(stage, bench.state.generation, inc.config, bench.fingerprint)


def control_work(bench: Bench, inc: Incumbent, stage: str, k: int) -> tuple[RunRequest, OnDone]:
    """The k-th control run of an incumbent, and what logs it."""
    generation = bench.state.generation
    request = bench.request(owner=f"control-{inc.config[:8]}", stage=stage, k=k, knobs=dict(inc.knobs),
                            commit=inc.commit, files={})

    def done(outcome: RunDone) -> None:
        if k not in bench.state.control_runs(stage, generation, inc.config, bench.fingerprint):
            bench.write("control.ended", ControlEnded(
                stage=stage, generation=generation, incumbent_commit=inc.commit, config_hash=inc.config,
                fingerprint=bench.fingerprint, run=outcome.figures))

    return request, done


def ensure_controls(bench: Bench, inc: Incumbent, stage: str, ks: Sequence[int]) -> dict[int, RunFigures]:
    """Control runs ``ks`` of the incumbent on this stage's seed list; missing ones are made now."""
    runs = controls(bench, inc, stage)
    missing = [k for k in ks if k not in runs]
    if missing:
        bench.drain()  # an idle worker may be at one of them
    work = [control_work(bench, inc, stage, k) for k in missing if k not in runs]
    by_id = {request.run_id: log for request, log in work}
    for i in range(0, len(work), bench.executor.workers):
        bench.check_stop()
        bench.view.status.doing = f"measuring the incumbent: {stage} controls"
        batch = [request for request, _ in work[i:i + bench.executor.workers]]
        infra_stop(bench.wave(batch, lambda outcome: by_id[outcome.request.run_id](outcome)))
    if work and stage == "confirm" and len(runs) > 1:
        values = [runs[k].val_bpb for k in sorted(runs)]
        bench.write("noise.measured", NoiseMeasured(
            stage=stage, sigma_unpaired=statistics.stdev(values), n=len(values), values=values,
            source=f"controls of {inc.commit[:12]}, generation {bench.state.generation}"))
    return runs


def bank_filler(bench: Bench, inc: Incumbent) -> Callable[[], tuple[RunRequest, OnDone] | None]:
    """For idle workers: the next control that the bank lacks, up to ``bank_max`` of the policy."""
    asked: set[int] = set()

    def work() -> tuple[RunRequest, OnDone] | None:
        runs = controls(bench, inc, "confirm")
        for k in range(bench.policy.bank_max):
            if k not in runs and k not in asked:
                asked.add(k)
                return control_work(bench, inc, "confirm", k)
        return None

    return work


def block_start(policy: Policy, runs: Collection[int], trial: TrialState, judged: int) -> int:
    """First k of the trial's confirm seeds: where it has begun, else the blocks of the bank in turn.

    Trials judged on one block of controls share its luck. So there are as many blocks as idle workers have filled, and
    one more for every ``TRIALS_A_BLOCK`` trials ``judged`` on this incumbent, up to ``bank_max`` controls.
    """
    started = trial.runs["confirm"]
    size = policy.max_pairs
    if started:
        return min(started) // size * size
    whole = 0
    while all(k in runs for k in range(whole * size, (whole + 1) * size)):
        whole += 1
    blocks = max(whole, min(1 + judged // TRIALS_A_BLOCK, policy.bank_max // size), 1)
    return judged % blocks * size


def preflight(bench: Bench, trial: TrialState, inc: Incumbent) -> bool:
    """A short run all the way to a score, the incumbent's beside it, and predictions. True when the trial may go on."""
    bench.view.status.doing = f"{trial.id}: preflight"
    bench.drain()  # its step times are compared: nothing else runs beside it
    begin = time.monotonic()
    candidate, control = short_runs(bench, trial, inc, "preflight", 0)
    done: dict[str, RunFigures] = {}
    failures = bench.wave([candidate, control], lambda d: done.update({d.request.run_id: d.figures}))
    seconds = time.monotonic() - begin
    infra_stop([f for f in failures if f.request is control])
    if failures:
        fail(bench, trial, "preflight", failures[0])
        return False
    run = done[candidate.run_id]
    bank = controls(bench, inc, "confirm")
    predicted = predict_bytes(run, list(bank.values()))
    converged = converged_bytes(bench.track, run)
    problem = _preflight_problem(bench, run, predicted, converged)
    if problem:
        bench.write("preflight.refused", PreflightRefused(reason=problem[0], detail=problem[1], seconds=seconds),
                    trial.id)
        return False
    bench.write("preflight.passed", PreflightPassed(
        seconds=seconds, artifact_bytes=run.artifact_bytes, code_bytes=run.code_bytes, predicted_bytes=predicted,
        cap_bytes=bench.track.cap_bytes, step_ms=run.step_ms, control_step_ms=done[control.run_id].step_ms,
        converged_bytes=converged,
        checks=["schema", "ranges", "not a repeat", "train", "export", "reload in a clean process", "score",
                "predicted bytes", "step time", "memory"],
    ), trial.id)
    return True


def short_runs(bench: Bench, trial: TrialState, inc: Incumbent, stage: str, k: int) -> tuple[RunRequest, RunRequest]:
    """(candidate's, incumbent's) short run of a few steps on one seed: side by side, their step times compare."""
    change = dict(trial.proposed.change)
    files = candidate_files(bench.repo, bench.track, inc.commit, change)
    return (
        bench.request(owner=trial.id, stage=stage, k=k, knobs={**inc.knobs, **change}, commit=inc.commit, files=files),
        bench.request(owner=f"{trial.id}-incumbent", stage=stage, k=k, knobs=dict(inc.knobs), commit=inc.commit,
                      files={}),
    )


def take_turns(bench: Bench, trial: TrialState, inc: Incumbent, wanted: int) -> bool:
    """More pairs of step times, until the trial has ``wanted``; who goes first changes. False when a run failed."""
    bench.drain()
    pairs, seconds = [list(p) for p in trial.timing], 0.0
    while len(pairs) < wanted:
        bench.check_stop()
        bench.view.status.doing = f"{trial.id}: step times, pair {len(pairs) + 1} of {wanted}"
        candidate, control = short_runs(bench, trial, inc, "timing", len(pairs))
        order = [candidate, control] if len(pairs) % 2 else [control, candidate]
        done: dict[str, RunFigures] = {}
        failures = bench.wave(order, lambda d, done=done: done.update({d.request.run_id: d.figures}))
        infra_stop([f for f in failures if f.request is control])
        if failures:
            fail(bench, trial, "timing", failures[0])
            return False
        pairs.append([done[control.run_id].step_ms, done[candidate.run_id].step_ms])
        seconds += sum(r.wall_seconds for r in done.values())
    bench.write("timing.measured", TimingMeasured(pairs=pairs, steps=bench.track.timing_steps, seconds=seconds),
                trial.id)
    return True


def predict_bytes(run: RunFigures, bank: Sequence[RunFigures]) -> int:
    """Total bytes of the candidate's confirm artifact: the incumbent's worst bytes per parameter times its parameters.

    A run of a few steps compresses far better than a trained one, so its own artifact only bounds from below.
    """
    ratio = max((c.artifact_bytes / c.params for c in bank), default=run.artifact_bytes / run.params)
    return run.code_bytes + max(run.artifact_bytes, round(ratio * run.params))


def converged_bytes(track: Track, run: RunFigures) -> int:
    """Total bytes of the same model trained for long, by the track's ratio; 0 = the track does not say."""
    return run.code_bytes + math.ceil(track.converged_ratio * run.payload_bytes) if track.converged_ratio else 0


def byte_slack(bench: Bench) -> float:
    """How far over the cap a prediction may lie: ``BYTE_SLACK``, or the worst over-prediction seen here, if larger.

    The gate judges the real artifact; preflight only saves the runs of what certainly does not fit.
    """
    errors = [
        t.finding.predicted_bytes / t.finding.measured_bytes - 1.0
        for t in bench.state.trials.values()
        if t.finding and t.finding.predicted_bytes and t.finding.measured_bytes
        and t.proposed.fingerprint == bench.fingerprint
    ]
    return max([BYTE_SLACK, *errors])


def _preflight_problem(bench: Bench, run: RunFigures, predicted: int, converged: int) -> tuple[str, str] | None:
    track, slack = bench.track, byte_slack(bench)
    if predicted > track.cap_bytes * (1 + slack):
        return "rejected.bytes", (f"predicted {predicted:,} bytes (code {run.code_bytes:,}), over the track's cap of "
                                  f"{track.cap_bytes:,} by more than {slack:.1%}, the largest error of a prediction")
    if track.converged_cap_bytes and converged > track.converged_cap_bytes:
        return "rejected.bytes", (f"trained for long it would weigh about {converged:,} bytes, over "
                                  f"{track.converged_cap_bytes:,}: short runs compress better")
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


def measure(
    bench: Bench, trial: TrialState, inc: Incumbent, stage: str, wanted: Sequence[int], stopped: list[EarlyStop],
) -> bool:
    """Make the candidate's runs ``wanted`` (by k) of a stage that are not in the ledger yet.

    Breadth runs may be given up on their way; why is put into ``stopped``. False when the stage cannot go on.
    """
    runs = trial.runs[stage]
    change = dict(trial.proposed.change)
    files = candidate_files(bench.repo, bench.track, inc.commit, change)
    requests = [
        bench.request(owner=trial.id, stage=stage, k=k, knobs={**inc.knobs, **change}, commit=inc.commit, files=files)
        for k in wanted if k not in runs
    ]
    if stage == "breadth" and bench.policy.early_fractions:
        bank = controls(bench, inc, stage)
        requests = [dataclasses.replace(r, watch=_watch(bench, bank.get(r.k), stopped)) for r in requests]
    for i in range(0, len(requests), bench.executor.workers):
        bench.check_stop()
        batch = requests[i:i + bench.executor.workers]
        for r in batch:
            bench.write(f"{stage}.started", StageStarted(k=r.k, seed=r.seed, run_id=r.run_id), trial.id)
        bench.view.status.doing = f"{trial.id}: {stage}"
        failures = bench.wave(
            batch, lambda d: bench.write(f"{stage}.ended", StageEnded(run=d.figures), trial.id))
        real = [f for f in failures if f.kind != "given-up"]
        trial.given_up_seconds += sum(f.wall_seconds for f in failures if f.kind == "given-up")
        if real:
            fail(bench, trial, stage, real[0])
        if failures:
            return False
    return True


def _watch(bench: Bench, control: RunFigures | None, stopped: list[EarlyStop]) -> Callable[[dict[str, Any]], str]:
    """Gives a breadth run up when its dev loss is hopeless; its sister runs follow."""
    def watch(event: dict[str, Any]) -> str:
        point = dev_point(event)
        if control and point and not stopped:
            stop = stops(bench.policy, control, point[0], control.steps, point[1])
            if stop:
                stopped.append(stop)
        return f"given up: dev loss {stopped[0].candidate:.4f} at step {stopped[0].step}" if stopped else ""

    return watch


def breadth(bench: Bench, trial: TrialState, inc: Incumbent) -> bool:
    """The cheap look, on the dev slice; it can only veto. True when the trial goes on to confirm."""
    pairs = range(bench.policy.breadth_pairs)
    control = ensure_controls(bench, inc, "breadth", pairs)
    prior = noise_before(bench.policy, history(bench), bench.calibration)
    stopped: list[EarlyStop] = []
    if not measure(bench, trial, inc, "breadth", pairs, stopped):
        if stopped and not trial.over:
            verdict = early_verdict(bench.policy, [control[stopped[0].k]], stopped[0], prior, cost_seconds=cost(trial))
            assert verdict is not None  # the watch asked the same policy
            decide(bench, trial, verdict)
        return False
    sides = [control[k] for k in pairs], [trial.runs["breadth"][k] for k in pairs]
    verdict = breadth_verdict(bench.policy, *sides, prior, cost_seconds=cost(trial)).decided
    if verdict is None:
        return True
    decide(bench, trial, verdict)
    return False


def confirm(bench: Bench, trial: TrialState, inc: Incumbent) -> None:
    """Group-sequential paired runs until the gate decides."""
    policy = bench.policy
    judged = sum(d.stage == "confirm" for d in history(bench, bench.state.generation))
    first = block_start(policy, controls(bench, inc, "confirm"), trial, judged)
    ensure_controls(bench, inc, "confirm", range(first, first + min(policy.controls, policy.max_pairs)))
    prior = noise_before(policy, history(bench), bench.calibration)
    want = policy.looks[0]
    while True:
        # An idle worker runs the next pair ahead; the gate still looks at the pairs in their order.
        ahead = -(-want // bench.executor.workers) * bench.executor.workers
        ks = range(first, first + min(ahead, policy.max_pairs))
        bank = ensure_controls(bench, inc, "confirm", ks)
        if not measure(bench, trial, inc, "confirm", ks, []):
            return
        body = confirm_step(policy, list(bank.values()), list(trial.runs["confirm"].values()), prior,
                            facts(bench, trial, inc))
        if body.needed_timing:
            if not take_turns(bench, trial, inc, body.needed_timing):
                return
        elif body.verdict != "continue":
            decide(bench, trial, body)
            return
        want = max(want, body.needed_pairs)


def facts(bench: Bench, trial: TrialState, inc: Incumbent) -> Facts:
    """What the gate is told of a trial beside its runs."""
    track = bench.track
    converged = Converged(ratio=track.converged_ratio, cap_bytes=track.converged_cap_bytes)
    plain = track.resolve({})
    mine, theirs = ({k for k in plain if knobs[k] != plain[k]}
                    for knobs in ({**inc.knobs, **trial.proposed.change}, inc.knobs))
    return Facts(cap_bytes=track.cap_bytes, timing=trial.timing, simpler=len(theirs) - len(mine),
                 converged=converged if track.converged_cap_bytes else None, cost_seconds=cost(trial))


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
    sizes = [r.artifact_bytes + r.code_bytes for r in body.candidate] if body.stage == "confirm" else []
    return Finding(line=trial.proposed.line, move=trial.proposed.move, predicted_bpb=predicted, measured_bpb=measured,
                   lesson=lesson, predicted_bytes=trial.preflight.predicted_bytes if trial.preflight else None,
                   measured_bytes=max(sizes, default=None))


def history(bench: Bench, generation: int | None = None) -> list[Decided]:
    """Verdicts under today's fingerprint that carry paired confirm runs: what the noise is pooled from."""
    return [
        t.decided for t in bench.state.trials.values()
        if t.decided and t.decided.stage == "confirm" and t.proposed.fingerprint == bench.fingerprint
        and generation in (None, t.proposed.generation)
    ]


def cost(trial: TrialState) -> float:
    """Worker-seconds of the candidate's own runs."""
    runs: list[Any] = [r for stage in trial.runs.values() for r in stage.values()]
    spent = trial.given_up_seconds + sum(r.wall_seconds for r in runs)
    return round(spent + (trial.preflight.seconds if trial.preflight else 0.0), 3)
