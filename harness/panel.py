"""Panel: does the cheap look predict the dear one? Configurations measured at breadth, by length, and at confirm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from harness.bench import Stopped
from harness.calibrate import Job, Outcome, Session, legal, open_session, paid, refuse_failed
from harness.errors import InfraError, UserError
from harness.executor import LocalExecutor
from harness.gate.correlation import LEVEL, Kills, kendall, kills, ledger_noise, proportion
from harness.gate.early import stops
from harness.gate.noise import Noise
from harness.gate.policy import Policy
from harness.gate.verdict import breadth_verdict
from harness.plan import Cost
from harness.tracks import Track, record_derivation
from harness.views import View
from harness.workspace import Workspace
from ledger.measured import PanelLength, PanelMeasured
from ledger.records import RunFigures
from trainer.knobs import REGISTRY, KnobValue

SIZE = 12  # configurations, at least
MIN_LEFT = 4  # of them must run to an end
MIN_TAU = 0.6  # below: breadth does not rank, and may only veto
MAX_FALSE_KILL = 0.10
MAX_PAIRS = 16
Change = dict[str, KnobValue]


def default_lengths(track: Track) -> list[int]:
    """A quarter, a half and three quarters of the track's confirm."""
    return sorted({max(1, round(share * track.confirm_steps)) for share in (0.25, 0.5, 0.75)})


def configurations(track: Track, knobs: Mapping[str, KnobValue], size: int = SIZE) -> list[Change]:
    """``size`` or more changes of the incumbent ``knobs``, by a rule that knows no track.

    Taken are numeric training knobs (what changes the model's size ranks itself), free here and active, with at
    least three values worth trying: those with the most such values first. Of each, one move down and one up its
    ladder: in turn the next rung down and the last one up, or the last one down and the next one up, so that small
    and large steps, good and bad ones are there. If that is too few, the other moves of the same knobs follow, then
    switches. Raises UserError when the track leaves fewer than ``size``.
    """
    eligible = [k for k in REGISTRY if k.role == "train" and k.kind in (int, float) and len(k.ladder) >= 3
                and k.name not in track.locked and REGISTRY.is_active(k.name, knobs)]
    eligible.sort(key=lambda k: -len(k.ladder))
    found: list[Change] = []

    def add(name: str, value: KnobValue) -> None:
        change = {name: value}
        if change not in found and legal(track, knobs, change):
            found.append(change)

    for turn in (0, 1):
        for i, knob in enumerate(eligible):
            if len(found) >= size:
                return found
            value = float(knobs[knob.name])
            down = sorted((r for r in knob.ladder if float(r) < value), key=float, reverse=True)
            up = sorted((r for r in knob.ladder if float(r) > value), key=float)
            small_down = (i + turn) % 2 == 0
            for rungs, small in ((down, small_down), (up, not small_down)):
                if rungs:
                    add(knob.name, rungs[0] if small else rungs[-1])
    for knob in REGISTRY:
        if len(found) < size and knob.kind is bool and knob.role != "shape":
            add(knob.name, not knobs[knob.name])
    if len(found) < size:
        raise UserError(f"track {track.name} leaves {len(found)} configurations to try around this incumbent; a panel "
                        f"needs {size}: free more knobs of the track")
    return found


def panel_jobs(
    changes: Sequence[Change], lengths: Sequence[int], pairs: int, confirm_steps: int, confirm_pairs: int,
) -> list[Job]:
    """Breadth by length, then confirm; seed by seed the incumbent and every change. All lengths share their seeds."""
    def job(stage: str, steps: int, k: int, change: Change) -> Job:
        return Job(label(change), f"panel-{stage}", stage, steps, k, tuple(change.items()))

    plan = [("breadth", steps, pairs) for steps in lengths] + [("confirm", confirm_steps, confirm_pairs)]
    return [job(stage, steps, k, change)
            for stage, steps, count in plan for k in range(count) for change in ({}, *changes)]


def label(change: Mapping[str, KnobValue]) -> str:
    """``beta2=0.97``, or ``incumbent``."""
    return ", ".join(f"{n}={v:g}" if isinstance(v, float) else f"{n}={v}" for n, v in change.items()) or "incumbent"


@dataclass(frozen=True, kw_only=True)
class EarlyRule:
    """What one early-stop rule of the policy would have done at one length."""

    fraction: float
    nats: float
    kills: Kills


@dataclass(frozen=True, kw_only=True)
class Report:
    """The record, and what it means. Lists go with ``body.lengths``."""

    body: PanelMeasured
    vetoes: list[Kills]
    early: list[list[EarlyRule]]
    margin: float  # bpb: better and worse than this
    left_out: list[str]
    warnings: list[str]
    advice: str


Runs = Mapping[tuple[tuple[str, KnobValue], ...], Sequence[RunFigures]]
"""Runs by change (() = the incumbent), in the order of their seeds."""


def gains(runs: Runs, changes: Sequence[Change]) -> list[float]:
    """Mean over seeds of incumbent - changed, bpb: positive = the change is better."""
    base = runs[()]
    return [fmean(b.val_bpb - r.val_bpb for b, r in zip(base, runs[tuple(c.items())], strict=True)) for c in changes]


def vetoed(policy: Policy, noise: Noise, runs: Runs, changes: Sequence[Change]) -> list[bool]:
    """Whether the policy's breadth would reject each change on these runs."""
    return [breadth_verdict(policy, runs[()], runs[tuple(c.items())], noise).decision == "veto" for c in changes]


def given_up(policy: Policy, runs: Runs, changes: Sequence[Change]) -> list[bool]:
    """Whether any of a change's runs would have been given up on its way, by its dev losses."""
    return [any(stops(policy, base, int(step), base.steps, loss)
                for base, run in zip(runs[()], runs[tuple(c.items())], strict=True) for step, loss in run.dev)
            for c in changes]


def assess(
    policy: Policy, noise: Noise, track: Track, config: str, fingerprint: str, changes: Sequence[Change],
    lengths: Mapping[int, Runs], confirm: Runs, left_out: Sequence[str] = (),
) -> Report:
    """Everything about a measured panel. ``lengths``: breadth runs by steps. Pure.

    Better and worse mean a confirm gain beyond the policy's materiality, as measured: a confirm of few pairs is
    noisy itself, which lowers tau and blurs both rates.
    """
    truth, margin = gains(confirm, changes), policy.materiality_bpb
    rows, vetoes, early = [], [], []
    for steps, runs in lengths.items():
        cheap = gains(runs, changes)
        tau = kendall(cheap, truth)
        veto = kills(truth, vetoed(policy, noise, runs, changes), margin)
        everything = [r for side in runs.values() for r in side]
        rows.append(PanelLength(
            steps=steps, gains=cheap, tau=tau.value, tau_low=tau.low, tau_high=tau.high, false_kill=veto.false_kill,
            true_kill=veto.true_kill, seconds=round(fmean(r.wall_seconds for r in everything), 3)))
        vetoes.append(veto)
        rules = [dataclasses.replace(policy, early_fractions=(f,), early_nats=(n,))
                 for f, n in zip(policy.early_fractions, policy.early_nats, strict=True)]
        early.append([EarlyRule(fraction=p.early_fractions[0], nats=p.early_nats[0],
                                kills=kills(truth, given_up(p, runs, changes), margin)) for p in rules])
    spent = [r for runs in (*lengths.values(), confirm) for side in runs.values() for r in side]
    body = PanelMeasured(
        track=track.name, fingerprint=fingerprint, config_hash=config, changes=[dict(c) for c in changes],
        confirm_gains=truth, confirm_pairs=len(confirm[()]), breadth_pairs=len(next(iter(lengths.values()))[()]),
        lengths=rows, seconds=round(sum(r.wall_seconds for r in spent), 3))
    return Report(body=body, vetoes=vetoes, early=early, margin=margin, left_out=list(left_out),
                  warnings=_warnings(rows, vetoes[0]), advice=recommend(rows, vetoes))


def _warnings(rows: Sequence[PanelLength], counts: Kills) -> list[str]:
    out = [f"breadth of {row.steps} steps ranks poorly (tau {row.tau:.2f}, under {MIN_TAU}): too short to rank, it may "
           "only veto" for row in rows if row.tau < MIN_TAU]
    if not counts.better or not counts.worse:
        out.append(f"the panel holds {counts.better} better and {counts.worse} worse configurations: a rate over none "
                   "says nothing")
    return out


def recommend(rows: Sequence[PanelLength], vetoes: Sequence[Kills]) -> str:
    """The cheapest length whose veto kills at most MAX_FALSE_KILL of the better configurations; how sure that is."""
    fit = [(row, v) for row, v in zip(rows, vetoes, strict=True) if v.better and v.false_kill <= MAX_FALSE_KILL]
    if not any(v.better for v in vetoes):
        return "no configuration of the panel is better than the incumbent: no length can be recommended from it"
    if not fit:
        return (f"no length kills at most {MAX_FALSE_KILL:.0%} of the better configurations: make breadth longer, or "
                "the veto milder (breadth_veto_sigmas)")
    row, v = min(fit, key=lambda f: f[0].steps)
    low, high = proportion(v.better_killed, v.better)
    text = (f"{row.steps} steps is the cheapest length that kills at most {MAX_FALSE_KILL:.0%} of the better "
            f"configurations: {v.better_killed} of {v.better} ({LEVEL:.0%} interval {low:.0%} to {high:.0%})")
    if high > MAX_FALSE_KILL:
        needed = math.ceil(math.log((1.0 - LEVEL) / 2.0) / math.log(1.0 - MAX_FALSE_KILL))
        text += f"; that is not shown by so few: it would take {needed} better ones without one kill"
    return text


def run_panel(
    ws: Workspace, *, track: str, name: str, lengths: Sequence[int] | None, pairs: int, confirm_pairs: int, view: View,
    ask: Callable[[Cost], bool], make_executor: Callable[..., LocalExecutor] = LocalExecutor,
) -> Outcome:
    """Measure a panel and write one ``panel.measured``; ``Outcome.body`` is a :class:`Report`. Resumable.

    ``lengths`` None: :func:`default_lengths`. Raises UserError.
    """
    for option, value in (("--pairs", pairs), ("--confirm-pairs", confirm_pairs)):
        if not 1 <= value <= MAX_PAIRS:
            raise UserError(f"{option} {value}: expected 1 to {MAX_PAIRS}")
    with open_session(ws, track, name, view, make_executor) as session:
        bench = session.bench
        if pairs < bench.policy.breadth_pairs:
            raise UserError(f"--pairs {pairs}: the policy's breadth judges {bench.policy.breadth_pairs} pairs; give at "
                            "least as many")
        steps = sorted(set(lengths)) if lengths else default_lengths(bench.track)
        bad = [n for n in steps if not 1 <= n <= bench.track.confirm_steps]
        if bad:
            raise UserError(f"--lengths {bad[0]}: expected 1 to {bench.track.confirm_steps}, the steps of a confirm of "
                            f"track {bench.track.name}")
        jobs = panel_jobs(configurations(bench.track, session.incumbent.knobs), steps, pairs,
                          bench.track.confirm_steps, confirm_pairs)
        try:
            if not paid(session, jobs, ask):
                return Outcome("declined", 0, len(jobs), track=track)
            with session.attended():
                report = _measure(session, jobs, steps)
        except Stopped:
            return Outcome("stopped", sum(session.finished(j) is not None for j in jobs), len(jobs), track=track)
        known = [r.body for r in bench.ledger.records(types=["panel.measured"])
                 if isinstance(r.body, PanelMeasured) and r.body.fingerprint == bench.fingerprint]
        if known and known[-1] == report.body:
            return Outcome("known", len(jobs), len(jobs), report, track)
        record_derivation(bench.ledger, bench.track)
        bench.write("panel.measured", report.body)
        bench.publish()
        return Outcome("measured", len(jobs), len(jobs), report, track)


def _measure(session: Session, jobs: Sequence[Job], lengths: Sequence[int]) -> Report:
    """Run what is missing, leave out the changes that did not run to an end, and assess the rest."""
    found, failures = session.measure(jobs)
    refuse_failed([f for f in failures if f.kind == "infra" or f.request.owner == label({})])
    broken = {f.request.owner: f"{f.request.owner}: {f.kind}" for f in failures}
    changes = [dict(c) for c in dict.fromkeys(j.change for j in jobs) if c and label(dict(c)) not in broken]
    if len(changes) < MIN_LEFT:
        raise InfraError(f"only {len(changes)} configurations ran to an end ({'; '.join(broken.values())}): no panel")

    def runs(stage: str, steps: int) -> Runs:
        out: dict[tuple[tuple[str, KnobValue], ...], list[RunFigures]] = {}
        for job in jobs:
            if job.stage == stage and (job.steps == steps or stage == "confirm") and job in found:
                out.setdefault(job.change, []).append(found[job])
        return out

    bench = session.bench
    noise, _ = ledger_noise(bench.policy, list(bench.ledger.records()), bench.fingerprint)
    return assess(bench.policy, noise, bench.track, session.incumbent.config, bench.fingerprint, changes,
                  {steps: runs("breadth", steps) for steps in lengths}, runs("confirm", 0), list(broken.values()))
