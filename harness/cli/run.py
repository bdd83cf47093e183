"""``autoresearch search | try | train | demo | knobs``: the commands that run things."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from typing import Annotated

import typer

from harness.cli.common import (
    MAX_SEED,
    JsonOption,
    PlainOption,
    WorkspaceOption,
    fail,
    guard,
    print_json,
    whole,
    workspace,
)
from harness.errors import UserError

TrackOption = Annotated[
    str, typer.Option("--track", "-t", help="Measurement protocol (see `autoresearch track list`).")
]
NameOption = Annotated[
    str, typer.Option("--name", help="Name of the search (its branch is search/NAME). Default: the track's.")
]
SetOption = Annotated[list[str], typer.Option("--set", metavar="KNOB=VALUE", help="May be given several times.")]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed", parser=whole(0, MAX_SEED), metavar="N", help="Seed of the search: proposals and runs follow."
    ),
]


PLANNED = (
    "review", "watch", "doctor", "sweep", "replay", "sensitivity", "diagnose", "submit", "cluster",
)
"""Commands that are designed but not built: they say so, and stay out of --help."""


def register(app: typer.Typer) -> None:
    """Add this file's commands to the root."""
    anything = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    for name in PLANNED:
        app.command(name=name, hidden=True, context_settings=anything)(planned)
    for command, example in (
        (search, "autoresearch search --track pocket --trials 8"),
        (try_, 'autoresearch try --set matrix_lr=0.02 --why "lower LRs won on short runs"'),
        (train, "autoresearch train --track pocket/confirm --set beta2=0.99"),
        (demo, "autoresearch demo --seed 3"),
        (knobs, "autoresearch knobs matrix_lr"),
    ):
        app.command(name=command.__name__.rstrip("_"), epilog=f"Example: {example}")(command)


def planned(ctx: typer.Context) -> None:
    """What a command that does not exist yet answers."""
    fail(f"{ctx.info_name}: planned, not in this version (see README.md, \"What is not there yet\"; "
         "`autoresearch --help` lists what works)", 2)


def deadline(hours: float | None, until: str | None) -> tuple[float | None, str]:
    """(unix seconds, reason code) from --hours and --until; the earlier wins. Raises UserError."""
    ends: list[tuple[float, str]] = []
    if hours is not None:
        if not 0 < hours <= 24 * 366:
            raise UserError(f"--hours {hours:g}: expected a number above 0, for example --hours 8 or --hours 0.5")
        ends.append((time.time() + hours * 3600, "budget.hours"))
    if until is not None:
        try:
            clock = datetime.strptime(until, "%H:%M").time()
        except ValueError:
            raise UserError(f"--until {until}: expected a time of day like 07:00 (24-hour clock)") from None
        now = datetime.now()
        end = datetime.combine(now.date(), clock)
        ends.append(((end if end > now else end + timedelta(days=1)).timestamp(), "budget.until"))
    return min(ends) if ends else (None, "budget.hours")


@guard
def search(
    track: TrackOption = "pocket",
    trials: Annotated[
        int | None,
        typer.Option("--trials", parser=whole(1), metavar="N", help="Stop at so many decided trials in all."),
    ] = None,
    hours: Annotated[float | None, typer.Option("--hours", help="Stop after so many hours.")] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="HH:MM", help="Stop at this time of day.")] = None,
    agent: Annotated[str, typer.Option("--agent", help="Who proposes: garden.")] = "garden",
    name: NameOption = "",
    seed: SeedOption = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Spend nothing: say what fits, what it costs, what it can show.")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Before a night (--hours, --until): measure the noise "
                           "first where that is not done yet and takes at most a tenth of it.")
    ] = True,
    json_: JsonOption = False,
    plain: PlainOption = False,
    where: WorkspaceOption = None,
) -> None:
    """The unattended loop: starts, resumes, stops cleanly (Ctrl-C once: after this run; twice: now)."""
    from harness.cli.calibrate import before_a_night, show_plan
    from harness.report import print_search
    from harness.search import SearchOptions, run_search
    from harness.views import make_view

    end, why = deadline(hours, until)
    ws = workspace(where)
    options = SearchOptions(track=track, name=name, seed=seed, agent=agent, trials=trials, deadline=end,
                            why_deadline=why)
    if plan:
        show_plan(ws, options, json_)
        return
    if json_:
        raise UserError("--json: only with --plan; what a search did is in `autoresearch ledger show --json`")
    if calibrate and end is not None:
        before_a_night(ws, options, make_view(plain))
    outcome = run_search(ws, options, make_view(plain))
    print_search(ws, outcome)


@guard
def try_(
    sets: SetOption = [],  # noqa: B006 - typer copies it
    why: Annotated[str, typer.Option("--why", help="Your hypothesis: why this should help.")] = "",
    patch: Annotated[
        str, typer.Option("--patch", metavar="FILE", help="A unified diff (refused until the sandbox exists).")
    ] = "",
    track: TrackOption = "pocket",
    name: NameOption = "",
    plain: PlainOption = False,
    where: WorkspaceOption = None,
) -> None:
    """Your own idea through the same door, the same gate and the same ledger."""
    from agent.proposers.manual import manual_proposal
    from harness.report import print_search
    from harness.search import SearchOptions, incumbent_knobs, run_search, search_name
    from harness.tracks import get_track
    from harness.views import make_view

    ws = workspace(where)
    if patch:
        raise UserError(f"--patch {patch}: code proposals are refused until the sandbox that must contain them exists; "
                        "knob changes (--set) run everywhere")
    protocol = get_track(track)
    now = incumbent_knobs(ws, protocol, search_name(name or track))
    proposal = manual_proposal(sets, why, incumbent=now, locked=protocol.locked)
    outcome = run_search(ws, SearchOptions(track=track, name=name), make_view(plain), proposal)
    print_search(ws, outcome)


@guard
def train(
    track: Annotated[
        str, typer.Option("--track", "-t", help="TRACK/STAGE, for example pocket/confirm.")
    ] = "pocket/confirm",
    sets: SetOption = [],  # noqa: B006
    seed: Annotated[int, typer.Option("--seed", parser=whole(0, MAX_SEED), metavar="N", help="Seed of the run.")] = 1,
    json_: JsonOption = False,
    plain: PlainOption = False,
    where: WorkspaceOption = None,
) -> None:
    """One run by hand: trained, exported, scored by the referee; nothing is written to the ledger."""
    from agent.proposers.manual import parse_settings
    from harness.manual import run_once

    ws = workspace(where)
    figures = run_once(ws, track, parse_settings(sets), seed, quiet=json_, plain=plain)
    if json_:
        print_json(figures)
    else:
        width = max(map(len, figures))
        for key, value in figures.items():
            print(f"{key:{width}s}  {value}")


@guard
def demo(
    trials: Annotated[int, typer.Option("--trials", parser=whole(1), metavar="N", help="Trials to decide.")] = 3,
    seed: SeedOption = None,
    track: TrackOption = "pocket",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over even if an unfinished demo is there.")] = False,
    plain: PlainOption = False,
    where: WorkspaceOption = None,
) -> None:
    """The whole loop in a scratch clone (.demo/): from the plain recipe to kept commits."""
    from harness.demo import run_demo

    raise typer.Exit(run_demo(workspace(where), trials=trials, seed=seed, track=track, fresh=fresh, plain=plain))


@guard
def knobs(
    name: Annotated[str | None, typer.Argument(help="One knob, in full.")] = None,
    json_: JsonOption = False,
) -> None:
    """Every knob: meaning, default, valid values, evidence."""
    from harness.report import knob_dict, print_knobs
    from trainer.knobs import REGISTRY

    chosen = [REGISTRY.get(name)] if name else list(REGISTRY)
    if json_:
        print_json([knob_dict(k) for k in chosen])
    else:
        print_knobs(chosen)
