"""``autoresearch gate calibrate | gate panel`` and what ``search --plan`` prints."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.common import JsonOption, PlainOption, WorkspaceOption, fail, guard, print_json, workspace
from harness.errors import UserError
from harness.output import say
from harness.plan import CALIBRATION_SHARE, DEFAULT_EDITS, DEFAULT_SEEDS

if TYPE_CHECKING:
    from harness.calibrate import Outcome
    from harness.panel import Report
    from harness.plan import Cost, Plan
    from harness.search import SearchOptions
    from harness.views import View
    from harness.workspace import Workspace
    from ledger.measured import CalibrationMeasured

TrackOption = Annotated[str, typer.Option("--track", "-t", help="Measurement protocol.")]
NameOption = Annotated[
    str, typer.Option("--name", help="Name of the search whose incumbent is measured. Default: the track's.")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before running.")]
STOPPED = 130  # exit code of a command that a person interrupted


@guard
def calibrate(
    track: TrackOption = "pocket",
    name: NameOption = "",
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", help="Seeds of the incumbent, and of each edit.")
    ] = DEFAULT_SEEDS,
    edits: Annotated[int, typer.Option("--edits", metavar="K", help="Reference edits.")] = DEFAULT_EDITS,
    yes: YesOption = False,
    json_: JsonOption = False,
    plain: PlainOption = False,
    where: WorkspaceOption = None,
) -> None:
    """Measure the track's noise on this machine: spread over seeds, of same-seed differences, of step times."""
    from harness.calibrate import run_calibration

    ws = workspace(where)
    outcome = run_calibration(ws, track=track, name=name, seeds=seeds, edits=edits, view=_view(json_, plain),
                              ask=_asker(yes, json_))
    _finish(outcome, "calibration")
    if json_:
        import msgspec

        print_json({"ended": outcome.ended, **msgspec.to_builtins(outcome.body)})
    else:
        print_calibration(outcome.body, outcome.ended == "known")


@guard
def panel(
    track: TrackOption = "pocket",
    name: NameOption = "",
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,N,...",
                          help="Breadth lengths in steps. Default: a quarter, a half, three quarters of confirm."),
    ] = "",
    pairs: Annotated[int, typer.Option("--pairs", metavar="N", help="Seeds of each breadth length.")] = 2,
    confirm_pairs: Annotated[int, typer.Option("--confirm-pairs", metavar="N", help="Seeds of confirm.")] = 4,
    yes: YesOption = False,
    json_: JsonOption = False,
    plain: PlainOption = False,
    where: WorkspaceOption = None,
) -> None:
    """Does breadth predict confirm? At least 12 configurations measured at both: rank correlation, false kills."""
    from harness.panel import run_panel

    outcome = run_panel(
        workspace(where), track=track, name=name, lengths=_steps(lengths), pairs=pairs, confirm_pairs=confirm_pairs,
        view=_view(json_, plain), ask=_asker(yes, json_))
    _finish(outcome, "panel")
    if json_:
        print_json({"ended": outcome.ended, **panel_dict(outcome.body)})
    else:
        print_panel(outcome.body, outcome.ended == "known")


def show_plan(ws: Workspace, options: SearchOptions, json_: bool) -> None:
    """What ``search --plan`` does. Raises UserError as the search would."""
    from harness.plan import gather

    found = gather(ws, options)
    if json_:
        print_json(dataclasses.asdict(found))
    else:
        print_plan(found)


def before_a_night(ws: Workspace, options: SearchOptions, view: View) -> None:
    """Calibrate where that is missing or stale, and no dearer than a tenth of the time that the search has.

    With fewer seeds if that makes it fit; said and left out if not. A stop leaves what is done for the next time.
    """
    from harness.calibrate import run_calibration
    from harness.gate.correlation import calibration_for
    from harness.plan import shrink, stage_time, todays_fingerprint
    from harness.tracks import get_track
    from ledger.store import Ledger

    track = get_track(options.track)
    if track.meaningless or options.deadline is None:
        return
    records = list(Ledger(ws.ledger).records()) if ws.ledger.is_file() else []
    fp, _, _ = todays_fingerprint(ws, track)
    if fp and calibration_for(records, fp):
        return
    night = options.deadline - time.time()
    confirm = stage_time(records, fp, track, "confirm", track.confirm_steps).seconds
    seeds, edits = shrink(night, confirm, track.workers)
    if not seeds:
        say("noise: not calibrated under this fingerprint, and that would take more than "
            f"{CALIBRATION_SHARE:.0%} of the time: the shipped scale serves", sys.stdout)
        return

    def ask(cost: Cost) -> bool:
        fits = cost.seconds <= CALIBRATION_SHARE * night
        say(f"calibration first: {cost.words()}, {cost.seconds / night:.0%} of the time"
            + ("" if fits else "; too much, left out: the shipped noise scale serves"), sys.stdout)
        return fits

    outcome = run_calibration(ws, track=options.track, name=options.name, seeds=seeds, edits=edits, view=view, ask=ask)
    if outcome.ended == "stopped":
        _finish(outcome, "calibration")


def _steps(text: str) -> list[int] | None:
    """``30,60,90`` as numbers. Raises UserError."""
    if not text.strip():
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--lengths {text}: expected whole numbers of steps, for example --lengths 30,60,90") from None


def _view(json_: bool, plain: bool) -> View:
    """The live panel or plain lines; with --json plain lines on stderr, so that stdout is one document."""
    from harness.views import PlainView, make_view

    return PlainView(sys.stderr) if json_ else make_view(plain)


def _asker(yes: bool, json_: bool) -> Callable[[Cost], bool]:
    """Shows the cost; asks on a terminal, goes on elsewhere."""
    def ask(cost: Cost) -> bool:
        say(f"this takes {cost.words()}", sys.stderr if json_ else sys.stdout)
        terminal = sys.stdin is not None and sys.stdin.isatty() and (sys.stderr if json_ else sys.stdout).isatty()
        return yes or not terminal or typer.confirm("go on?", default=True, err=json_)

    return ask


def _finish(outcome: Outcome, what: str) -> None:
    """Leave with a word when there is nothing to show."""
    if outcome.ended == "declined":
        fail(f"no {what}: nothing more was run", 1)
    if outcome.ended == "stopped":
        fail(f"stopped: {outcome.done} of {outcome.of} runs of this {what} are done and kept; the same command goes "
             "on from there", STOPPED)


def print_calibration(body: CalibrationMeasured, known: bool) -> None:
    """The figures, and what they mean for the gate."""
    from rich.table import Table

    from harness.gate.correlation import LEVEL, shared_df, sigma_interval
    from harness.gate.policy import load_policy
    from harness.panel import label
    from harness.report import console
    from harness.tracks import declared_track

    out, track = console(), declared_track(body.track)
    policy = load_policy(track.policy_track)

    def spread(sigma: float, df: float) -> str:
        low, high = sigma_interval(sigma, df)
        return f"{sigma:.5f} bpb   ({LEVEL:.0%} interval {low:.5f} to {high:.5f}; {df:.3g} degrees of freedom)"

    n = len(body.values)
    table = Table.grid(padding=(0, 2))
    table.add_row("one seed twice", "equal, bit for bit" if body.bitwise else
                  f"NOT equal: {body.same_seed[0]:.5f} and {body.same_seed[1]:.5f} bpb")
    table.add_row("over seeds", spread(body.sigma_run, n - 1))
    for edit in body.edits:
        table.add_row(f"difference {label(edit.change)}", f"{spread(edit.sigma_d, len(edit.differences) - 1)}   mean "
                      f"{sum(edit.differences) / len(edit.differences):+.5f}")
    table.add_row("differences, pooled", spread(body.sigma_d, shared_df(n, len(body.edits))))
    table.add_row("same-seed correlation", f"{body.correlation:.4f}   ({LEVEL:.0%} interval {body.correlation_low:.4f} "
                                           f"to {body.correlation_high:.4f})")
    table.add_row("step time", f"standard deviation {body.step_ms_spread_pct:.1f}% of the mean, equal code "
                               f"(taken for noise by the gate: {policy.time_deadband_pct:g}%)")
    table.add_row("artifact", f"{body.bytes_spread:,} bytes between the smallest and the largest seed")
    table.add_row("cost", f"{body.seconds / 60:.1f} worker-minutes; "
                  + ("known already, nothing was written" if known else "written as calibration.measured"))
    out.print(table)
    for line in calibration_remarks(body, policy, track.deterministic):
        out.print(f"- {line}", soft_wrap=True)
    if track.meaningless:
        out.print(f"[bold red]track {track.name} is for fault tests: its figures mean nothing[/bold red]")


def calibration_remarks(body: CalibrationMeasured, policy: Any, deterministic: bool) -> list[str]:
    """What the figures mean for the track's policy, in words."""
    out = []
    if deterministic and not body.bitwise:
        out.append("the track says that runs repeat bit for bit here, and they do not: find out why before searching")
    low, high, least = body.correlation_low, body.correlation_high, policy.min_correlation
    if low >= least:
        out.append(f"pairing by seed helps (the gate pairs from a correlation of {least:g})")
    elif high < least:
        out.append(f"pairing by seed does not help (under {least:g}): the gate will compare two samples")
    else:
        out.append(f"whether pairing helps is not settled: {least:g} lies inside the interval; more --seeds would tell")
    for what, measured, shipped in (("sigma_d", body.sigma_d, policy.prior.sigma_d),
                                    ("sigma_run", body.sigma_run, policy.prior.sigma_run)):
        if not 0.5 <= measured / shipped <= 2.0:
            out.append(f"{what} is {measured / shipped:.2g} times the shipped {shipped:g} of track {policy.track}")
    return out


def panel_dict(report: Report) -> dict[str, Any]:
    """A panel's report for a program."""
    import msgspec

    data = dataclasses.asdict(dataclasses.replace(report, body=None))  # type: ignore[arg-type]
    del data["body"]
    return {**msgspec.to_builtins(report.body), **data}


def print_panel(report: Report, known: bool) -> None:
    """Configurations by confirm gain, lengths with their rates, warnings, advice."""
    from rich.table import Table

    from harness.gate.correlation import LEVEL, Kills, proportion
    from harness.panel import label
    from harness.report import console

    out, body = console(), report.body

    def share(hits: int, n: int) -> str:
        low, high = proportion(hits, n)
        return f"{hits} of {n} ({low:.0%} to {high:.0%})" if n else "none there"

    def rates(k: Kills) -> tuple[str, str]:
        return share(k.better_killed, k.better), share(k.worse_killed, k.worse)

    table = Table("configuration", "confirm", *(f"{row.steps} steps" for row in body.lengths), box=None,
                  header_style="bold", title="mean gain over the incumbent, bpb", title_justify="left")
    for i in sorted(range(len(body.changes)), key=lambda i: -body.confirm_gains[i]):
        table.add_row(label(body.changes[i]), f"{body.confirm_gains[i]:+.4f}",
                      *(f"{row.gains[i]:+.4f}" for row in body.lengths))
    out.print(table)
    lengths = Table("breadth", "a run", "Kendall tau-b", "better ones killed", "worse ones killed", box=None,
                    header_style="bold", title=f"\n{LEVEL:.0%} intervals; better, worse: by more than "
                    f"{report.margin:g} bpb in confirm", title_justify="left")
    for row, veto, early in zip(body.lengths, report.vetoes, report.early, strict=True):
        lengths.add_row(f"{row.steps} steps", f"{row.seconds:.0f} s",
                        f"{row.tau:.2f} ({row.tau_low:.2f} to {row.tau_high:.2f})", *rates(veto))
        for rule in early:
            lengths.add_row(f"  given up at {rule.fraction:.0%}", "", f"over {rule.nats:g} nats", *rates(rule.kills))
    out.print(lengths)
    out.print()
    for line in (*report.warnings, *(f"left out: {text}" for text in report.left_out), report.advice):
        out.print(f"- {line}", soft_wrap=True)
    out.print(f"{body.seconds / 60:.1f} worker-minutes; "
              + ("known already, nothing was written" if known else "written as panel.measured"))


def print_plan(plan: Plan) -> None:
    """The night in one table."""
    from rich.table import Table

    from harness.plan import NO_GAIN
    from harness.report import console

    out, held, night, gate = console(), plan.held, plan.night, plan.gate
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("search", f"{plan.search} on track {plan.track}; {plan.decided} trials decided so far")
    table.add_row("night", f"{(night.seconds or held.seconds) / 3600:.2f} hours ({plan.night_from})")
    c = plan.calibration
    table.add_row("calibration", "present" if not c.why else f"{c.status} ({c.why}): {c.runs} runs, "
                  f"{c.seconds / 60:.1f} minutes, {c.share:.1%} of the night. {c.advice}")
    for name, each in plan.times.items():
        table.add_row(f"{name} run", f"{each.seconds:.1f} s   {'' if each.measured else 'ESTIMATE, '}"
                                     f"{each.source}")
    table.add_row("trials that fit", f"{held.trials:.0f}   ({held.trial_s:.0f} s each, {held.first_s:.0f} s at the "
                                     f"start, {held.keep_s:.0f} s after a keep; ended by {held.limit})")
    table.add_row("", f"pass breadth: {night.pass_share:.0%} ({plan.pass_from})")
    table.add_row("noise", f"1 sigma = {gate.sigma:.5f} bpb, {gate.form}; {gate.source}")
    for label, r in gate.rates.items():
        if label != NO_GAIN:
            table.add_row(f"kept at {label}", f"{r.p_keep:.1%}   (a true gain of {r.gain:.5f} bpb that reaches "
                                              f"confirm; {r.runs:.1f} candidate runs)")
    table.add_row("expected keeps", f"{held.keeps:.2f}, of these {held.false_keeps:.2f} false ({gate.false_share:.1%} "
                                    "of keeps), when 1 proposal in 10 gains 2 sigma and the others nothing")
    table.add_row("dollars", f"{held.dollars:.2f} at {night.price:g} per worker-hour" if night.price
                  else "none: the track has no price")
    out.print(table)
    for line in plan.notes:
        out.print(f"- {line}", soft_wrap=True)
    out.print(f"nothing was run. {plan.formula}", style="dim", soft_wrap=True)
