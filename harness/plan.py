"""What a night would hold, before anything is spent: run times, trials that fit, power, false keeps, money.

Pure arithmetic on figures; at the end :func:`gather`, which reads them from a workspace and runs nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from harness.gate.correlation import calibration_for, ledger_noise
from harness.gate.noise import Noise, form, shipped
from harness.gate.policy import Policy, load_policy
from harness.tracks import STAGES, Track, declared_track, device_problem, environment, fingerprint
from ledger.measured import CalibrationMeasured, PanelMeasured
from ledger.records import (
    ControlEnded,
    Decided,
    PreflightPassed,
    RunFigures,
    SearchStarted,
    StageEnded,
    TrialProposed,
)

if TYPE_CHECKING:
    from harness.gate.simulate import Rates
    from harness.search import SearchOptions
    from harness.workspace import Workspace

CALIBRATION_SHARE = 0.10  # of a night, at most
DEFAULT_SEEDS, DEFAULT_EDITS = 8, 2  # of a calibration
MIN_SEEDS, MAX_SEEDS = 4, 64
ASSUMED_NIGHT_S = 8 * 3600.0  # when neither an end nor a number of trials is asked for
MIN_TRIALS_FOR_SHARE = 5  # with fewer, the share of trials that pass breadth is not taken from the ledger
SIMULATED = 20_000
NO_GAIN, MATERIALITY, TARGET = "no gain", "materiality", "2 sigma"


@dataclass(frozen=True, kw_only=True)
class RunTime:
    """Wall seconds of one run (of a stage), and where the figure comes from."""

    seconds: float
    source: str
    measured: bool = True  # under this fingerprint


def timed_runs(records: Iterable[Any], fingerprints: Collection[str]) -> list[tuple[str, RunFigures]]:
    """(stage, figures) of every run that searches made under one of ``fingerprints``."""
    found: list[tuple[str, RunFigures]] = []
    ours: set[tuple[str, str]] = set()
    for r in records:
        body = r.body
        if isinstance(body, TrialProposed) and body.fingerprint in fingerprints:
            ours.add((r.search, r.trial))
        elif isinstance(body, ControlEnded) and body.fingerprint in fingerprints:
            found.append((body.stage, body.run))
        elif isinstance(body, StageEnded) and (r.search, r.trial) in ours:
            found.append((r.type.partition(".")[0], body.run))
    return found


def run_time(
    runs: Iterable[tuple[str, RunFigures]], stage: str, steps: int, where: str = "under this fingerprint",
) -> RunTime | None:
    """Wall seconds of a run of ``steps`` steps; None when ``runs`` (stage, figures) tell nothing.

    The median of runs of that stage and length; else the time of any run outside its steps, plus its time per step.
    A run whose training was taken over from an earlier attempt (its wall time is shorter than its training) does
    not count.
    """
    whole = [(s, r) for s, r in runs if r.wall_seconds >= r.train_seconds and r.steps > 0]
    same = [r.wall_seconds for s, r in whole if s == stage and r.steps == steps]
    if same:
        return RunTime(seconds=median(same), source=f"median run time {where}, n = {len(same)}")
    if not whole:
        return None
    fixed = median(r.wall_seconds - r.train_seconds for _, r in whole)
    step = median(r.train_seconds / r.steps for _, r in whole)
    return RunTime(seconds=fixed + step * steps,
                   source=f"scaled to {steps} steps from other lengths {where}, n = {len(whole)}")


def calibration_runs(seeds: int, edits: int) -> int:
    """Runs of a calibration: the incumbent and every edit on every seed, and the first seed once more."""
    return 1 + seeds * (1 + edits)


def stage_time(records: Sequence[Any], fp: str, track: Track, stage: str, steps: int) -> RunTime:
    """The best that is known of a run's time under fingerprint ``fp``, and what that is.

    In this order: runs under it; its panel and calibration; runs of the same track elsewhere (a time is no score:
    as an estimate it may cross fingerprints); the slowest run that the track lets through.
    """
    known = run_time(timed_runs(records, {fp}), stage, steps)
    if known:
        return known
    for r in reversed(records):
        if isinstance(r.body, PanelMeasured) and r.body.fingerprint == fp and stage == "breadth":
            same = [length.seconds for length in r.body.lengths if length.steps == steps]
            if same:
                return RunTime(seconds=same[0], source="mean of the panel's runs of this length")
    calibration = calibration_for(records, fp)
    if calibration:
        runs = calibration_runs(len(calibration.values), len(calibration.edits))
        full = stage == calibration.stage
        return RunTime(seconds=calibration.seconds / runs, measured=full,
                       source=f"{'' if full else 'at most: '}mean of the calibration's {runs} {calibration.stage} runs")
    others = {r.body.fingerprint for r in records
              if isinstance(r.body, SearchStarted | CalibrationMeasured) and r.body.track == track.name}
    elsewhere = run_time(timed_runs(records, others), stage, steps, f"of {track.name} under another fingerprint")
    if elsewhere:
        return replace(elsewhere, measured=False)
    return RunTime(seconds=steps * track.step_time_limit_s, measured=False,
                   source=f"assumed: {steps} steps at the track's limit of {track.step_time_limit_s:g} s a step")


def preflight_time(records: Sequence[Any], fp: str, track: Track) -> RunTime:
    """Wall seconds of a preflight: a short run of the candidate, and one of the incumbent beside it."""
    ours = {(r.search, r.trial) for r in records if isinstance(r.body, TrialProposed) and r.body.fingerprint == fp}
    seen = [r.body.seconds for r in records
            if isinstance(r.body, PreflightPassed) and (r.search, r.trial) in ours]
    if seen:
        return RunTime(seconds=median(seen), source=f"median of {len(seen)} preflights under this fingerprint")
    one = stage_time(records, fp, track, "preflight", track.timing_steps)
    return replace(one, seconds=math.ceil(2 / track.workers) * one.seconds)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a set of runs will take. ``seconds``: wall; ``dollars``: 0 where the track has no price."""

    runs: int  # in all
    left: int  # still to be made
    seconds: float
    dollars: float
    source: str

    def words(self) -> str:
        """One line for people."""
        done = f" ({self.runs - self.left} of {self.runs} are done)" if self.left < self.runs else ""
        money = f", ${self.dollars:.2f}" if self.dollars else ""
        return f"{self.left} runs{done}, about {self.seconds / 60:.1f} minutes{money} ({self.source})"


def cost_of(groups: Sequence[tuple[int, int, RunTime]], workers: int, price: float) -> Cost:
    """Cost of groups of (runs in all, left, time of one), ``workers`` side by side, ``price`` dollars an hour each."""
    sources = dict.fromkeys(each.source for _, left, each in groups if left)
    busy = sum(left * each.seconds for _, left, each in groups)
    return Cost(runs=sum(n for n, _, _ in groups), left=sum(left for _, left, _ in groups), dollars=busy / 3600 * price,
                seconds=sum(math.ceil(left / workers) * each.seconds for _, left, each in groups),
                source="; ".join(sources) or "nothing is left to run")


@dataclass(frozen=True, kw_only=True)
class GateRates:
    """What becomes of proposals of known worth that reach confirm, by simulation."""

    form: str  # paired | two-sample
    sigma: float  # "1 sigma": of a difference (paired) or of a run
    source: str  # of the noise
    rates: dict[str, Rates]  # NO_GAIN, MATERIALITY, "1 sigma", "2 sigma", "3 sigma"
    false_share: float  # of keeps, when TRUE_SHARE of the proposals gain 2 sigma and the others nothing
    confirm_runs: float  # mean candidate runs of that mixture
    keep_rate: float  # keeps per trial of that mixture
    false_rate: float  # of these, with no gain


def gate_rates(policy: Policy, noise: Noise, source: str, *, trials: int = SIMULATED, seed: int = 0) -> GateRates:
    """Simulate ``policy`` with the gate believing ``noise``, and the edits as noisy as the ledger says.

    1, 2, 3 sigma: edits of exactly that noise. No gain and materiality: over the track's spread of edits. As long as
    nothing is measured, the truth is taken to be the shipped scale, without the inflation that the gate adds.
    """
    from harness.gate.simulate import TRUE_SHARE, false_share, rates

    kind, world = form(policy, noise), policy
    if noise != shipped(policy):
        world = replace(policy, prior=replace(policy.prior, sigma_d=noise.sigma_d, sigma_run=noise.sigma_run))
    sigma = world.prior.sigma_d if kind == "paired" else world.prior.sigma_run
    wanted = {NO_GAIN: (0.0, None), MATERIALITY: (policy.materiality_bpb, None)}
    wanted |= {f"{m} sigma": (m * sigma, sigma) for m in (1, 2, 3)}
    found = {label: rates(world, gain, trials=trials, seed=seed + i, sigma=fixed, noise=noise)
             for i, (label, (gain, fixed)) in enumerate(wanted.items())}
    null, target = found[NO_GAIN], found[TARGET]
    false = (1 - TRUE_SHARE) * null.p_keep
    return GateRates(
        form=kind, sigma=sigma, source=source, rates=found, false_share=false_share(null.p_keep, target.p_keep),
        confirm_runs=(1 - TRUE_SHARE) * null.runs + TRUE_SHARE * target.runs,
        keep_rate=false + TRUE_SHARE * target.p_keep, false_rate=false)


@dataclass(frozen=True, kw_only=True)
class Night:
    """Everything that :func:`hold` needs. Times are wall seconds of one run."""

    seconds: float  # of the night; 0 = as long as ``trials`` need
    trials: int | None  # still to be decided, at most
    workers: int
    breadth_s: float
    confirm_s: float
    preflight_s: float
    breadth_pairs: int
    controls: int
    confirm_runs: float  # candidate runs of a trial that reaches confirm
    pass_share: float  # of trials that reach confirm
    keep_rate: float  # keeps per trial that reaches confirm
    false_rate: float  # of these, with no gain
    honest_pairs: int = 0
    calibration_s: float = 0.0  # still to be paid
    price: float = 0.0  # dollars per worker-hour


@dataclass(frozen=True, kw_only=True)
class Held:
    """What fits."""

    trials: float
    keeps: float
    false_keeps: float
    trial_s: float
    keep_s: float
    first_s: float  # the incumbent's own runs at the start
    seconds: float  # of it all
    dollars: float
    limit: str  # what ends it: time | trials


FORMULA = ("night = calibration + b/w B + m/w C + N (P + b/w B + s max(1, c/w) C) + N s q (b/w B + max(m, h)/w C + "
           "h/w C), with b/w, m/w and h/w rounded up. N trials, B breadth run, C confirm run, P preflight, w workers, "
           "b breadth pairs, m controls, h fresh pairs after a keep, s share that passes breadth, c candidate confirm "
           "runs, q keeps per trial that reaches confirm")


def hold(night: Night) -> Held:
    """Trials that fit into the night, by :data:`FORMULA`. Never negative; fractional on purpose."""
    def waves(runs: int) -> int:
        return math.ceil(runs / night.workers)

    breadth = waves(night.breadth_pairs) * night.breadth_s
    first = breadth + waves(night.controls) * night.confirm_s
    confirm = max(1.0, night.confirm_runs / night.workers) * night.confirm_s
    trial = night.preflight_s + breadth + night.pass_share * confirm
    # After a keep the winner's fresh runs are the new bank; its parent runs on the same seeds.
    bank = max(night.controls, night.honest_pairs)
    keep = breadth + (waves(bank) + waves(night.honest_pairs)) * night.confirm_s
    each, fixed = trial + night.pass_share * night.keep_rate * keep, night.calibration_s + first
    trials, limit = max(0.0, (night.seconds - fixed) / each) if night.seconds > 0 else math.inf, "time"
    if night.trials is not None and night.trials <= trials:
        trials, limit = float(night.trials), "trials"
    seconds, reach = fixed + trials * each, trials * night.pass_share
    return Held(trials=trials, keeps=reach * night.keep_rate, false_keeps=reach * night.false_rate, trial_s=trial,
                keep_s=keep, first_s=first, seconds=seconds, limit=limit,
                dollars=seconds / 3600 * night.workers * night.price)


def shrink(night_s: float, confirm_s: float, workers: int, seeds: int = DEFAULT_SEEDS, edits: int = DEFAULT_EDITS,
           ) -> tuple[int, int]:
    """(seeds, edits) of the largest calibration within CALIBRATION_SHARE of the night, at most as asked for.

    (0, 0) when even MIN_SEEDS seeds and one edit are too much.
    """
    fits = [(calibration_runs(n, k), k, n) for n in range(MIN_SEEDS, seeds + 1) for k in range(1, edits + 1)
            if math.ceil(calibration_runs(n, k) / workers) * confirm_s <= CALIBRATION_SHARE * night_s]
    _, k, n = max(fits, default=(0, 0, 0))
    return n, k


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """Is there a calibration, and what would one cost?"""

    status: str  # present | stale | missing
    why: str  # there is none; "" when there is one
    runs: int
    seconds: float  # wall
    share: float  # of the night
    advice: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that ``search --plan`` prints."""

    search: str
    track: str
    night_from: str
    decided: int  # trials of this search so far
    calibration: CalibrationPlan
    times: dict[str, RunTime]  # preflight, breadth, confirm
    pass_from: str
    night: Night
    held: Held
    gate: GateRates
    formula: str
    notes: list[str]


def passing(records: Sequence[Any], fp: str) -> tuple[float, str]:
    """(share of trials that pass breadth, where it is from): the ledger's under ``fp``, else 1, the dearest case."""
    ours = {(r.search, r.trial) for r in records if isinstance(r.body, TrialProposed) and r.body.fingerprint == fp}
    stages = [r.body.stage for r in records if isinstance(r.body, Decided) and (r.search, r.trial) in ours]
    if len(stages) < MIN_TRIALS_FOR_SHARE:
        return 1.0, "assumed: every trial reaches confirm, so that the night is not promised too much"
    return stages.count("confirm") / len(stages), f"{len(stages)} trials under this fingerprint"


def todays_fingerprint(ws: Workspace, track: Track) -> tuple[str, dict[str, str], list[str]]:
    """(fingerprint, parts, notes) as the search would compute them; ("", {}, why) while the data is not there."""
    from harness.data import EMBEDDED, embedded_dir
    from trainer.data.errors import DataError
    from trainer.data.manifest import load_manifest
    from trainer.tree import evaluator_hash

    folder = embedded_dir(ws) if track.data == EMBEDDED else ws.data / track.data
    try:
        data = load_manifest(folder).fingerprint
    except (DataError, OSError):
        return "", {}, [f"the data in {folder} is not there yet, so nothing in the ledger is known to be comparable"]
    return *fingerprint(track, data, evaluator_hash(ws.root / "trainer")), []


def gather(ws: Workspace, options: SearchOptions) -> Plan:
    """The plan of a search with these options. Reads the ledger and files; runs nothing, writes nothing.

    Raises UserError where the search itself would refuse its options. A track that cannot run here can be planned.
    """
    from agent.proposers import make_proposer
    from harness.search import search_name
    from harness.state import fold
    from harness.workspace import require_own_code
    from ledger.store import Ledger

    require_own_code(ws)
    track = declared_track(options.track)
    name = search_name(options.name or track.name)
    make_proposer(options.agent, ws.kb)
    records = list(Ledger(ws.ledger).records()) if ws.ledger.is_file() else []
    state = fold(records, name)
    if state.started and state.started[0].track != track.name:
        raise UserError(f"--name {name}: that search belongs to track {state.started[0].track}, not {track.name}; "
                        "give --track and --name of one search")
    fp, parts, notes = todays_fingerprint(ws, track)
    notes += [f"on this machine it cannot run: {problem}"] if (problem := device_problem(track)) else []
    left = None if options.trials is None else max(0, options.trials - state.decided)
    return plan(records, fp, parts, track, name, left, options.deadline, state.decided, notes)


def plan(
    records: Sequence[Any], fp: str, parts: dict[str, str], track: Track, name: str, left: int | None,
    deadline: float | None, decided: int, notes: list[str],
) -> Plan:
    """The plan from a ledger's records. ``left``: trials to decide; ``deadline``: unix seconds; None: not asked for."""
    from harness.noisebasis import NEVER, noise_basis, stale

    policy, _ = noise_basis(records, track, load_policy(track.policy_track), fp, parts, lambda text: None)
    times = {"preflight": preflight_time(records, fp, track),
             **{s: stage_time(records, fp, track, s, track.steps(s)) for s in STAGES}}
    gate = gate_rates(policy, *ledger_noise(policy, records, fp))
    share, share_from = passing(records, fp)
    why = stale(records, fp, parts, track.name, environment(track)) if fp else "cannot be told before the data is there"
    confirm = times["confirm"].seconds
    runs = calibration_runs(DEFAULT_SEEDS, DEFAULT_EDITS)
    price = math.ceil(runs / track.workers) * confirm
    seconds, source = (ASSUMED_NIGHT_S, "assumed: 8 hours") if left is None else (0.0, "as long as the trials need")
    if deadline is not None:
        seconds, source = max(1.0, deadline - time.time()), "the time asked for"
    night = Night(
        seconds=seconds, trials=left, workers=track.workers, breadth_s=times["breadth"].seconds, confirm_s=confirm,
        preflight_s=times["preflight"].seconds, breadth_pairs=policy.breadth_pairs, controls=policy.controls,
        confirm_runs=gate.confirm_runs, pass_share=share, keep_rate=gate.keep_rate, false_rate=gate.false_rate,
        honest_pairs=policy.honest_pairs, calibration_s=price if why else 0.0, price=track.worker_price_per_hour)
    held = hold(night)
    whole = seconds or held.seconds
    status = "present" if not why else "stale" if fp and why != NEVER else "missing"
    return Plan(
        search=name, track=track.name, night_from=source, decided=decided, times=times, pass_from=share_from,
        night=night, held=held, gate=gate, formula=FORMULA, notes=notes,
        calibration=CalibrationPlan(status=status, why=why, runs=runs, seconds=price, share=price / whole,
                                    advice=_advice(track, whole, price, confirm) if why else ""))


def _advice(track: Track, night_s: float, price_s: float, confirm_s: float) -> str:
    command = f"autoresearch gate calibrate --track {track.name}"
    if price_s <= CALIBRATION_SHARE * night_s:
        return command
    seeds, edits = shrink(night_s, confirm_s, track.workers)
    if seeds:
        return f"over {CALIBRATION_SHARE:.0%} of the night; shrink it: {command} --seeds {seeds} --edits {edits}"
    least = math.ceil(calibration_runs(MIN_SEEDS, 1) / track.workers) * confirm_s / CALIBRATION_SHARE
    return (f"over {CALIBRATION_SHARE:.0%} of the night, even with --seeds {MIN_SEEDS} --edits 1; it fits a night of "
            f"{least / 3600:.1f} hours")
