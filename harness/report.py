"""What a command prints at its end: lineage, summary, where to look next; and the table of knobs."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from harness.search import SearchOutcome
from harness.state import SearchState
from harness.tracks import declared_track
from harness.workspace import DEMO_DIR, Workspace, recipe_path
from ledger.queries import lineage
from ledger.render_lineage import lineage_tree
from ledger.store import Ledger
from trainer.knobs import Knob

REASONS = {
    "budget.trials": "all trials decided",
    "budget.keeps": "as many kept as asked for",
    "budget.hours": "the hours are over",
    "budget.until": "the time of day is reached",
    "stopped": "stopped by you; the same command resumes",
    "exhausted": "nothing left to propose",
    "nothing-to-do": "already complete: nothing was run",
}


def console() -> Console:
    """Standard output; wide enough not to wrap when it is a pipe."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=120)


def print_search(ws: Workspace, outcome: SearchOutcome) -> None:
    """Lineage tree, summary, next steps."""
    out, state = console(), outcome.state
    records = list(Ledger(ws.ledger).records(search=outcome.search))
    out.print()
    out.print(lineage_tree(lineage(records, search=outcome.search)))
    out.print()
    out.print(_summary(outcome, state))
    out.print(_next_steps(ws, outcome))


def claimed_gain(state: SearchState) -> float:
    """Sum of the gains that the standing keeps were kept for, bpb: selected figures, so too good on average."""
    return -sum(t.decided.delta_bpb or 0.0 for t in state.standing if t.decided)


def honest_gain(state: SearchState) -> tuple[float, float] | None:
    """(gain, standard error) over all standing keeps, each from fresh seeds against its parent; None if one lacks."""
    fresh = [t.honest for t in state.standing]
    if not fresh or not all(fresh):
        return None
    return sum(h.gain for h in fresh if h), math.sqrt(sum(h.se**2 for h in fresh if h))


def control_means(state: SearchState) -> tuple[float, float] | None:
    """(baseline, incumbent) mean val_bpb of their control runs, each on seeds of its own; None if one lacks."""
    if not state.standing or not state.started:
        return None
    ends, under = [], state.started[-1].fingerprint  # never across fingerprints
    for config in (state.started[0].incumbent_config, state.standing[-1].proposed.config_hash):
        groups = [runs for key, runs in state.controls.items()
                  if (key[0], key[2], key[3]) == ("confirm", config, under) and runs]
        if not groups:
            return None
        ends.append(fmean(r.val_bpb for runs in groups for r in runs.values()))
    return ends[0], ends[1]


def _summary(outcome: SearchOutcome, state: SearchState) -> Panel:
    table = Table.grid(padding=(0, 2))
    verdicts: dict[str, int] = {}
    for t in state.trials.values():
        if t.over:
            verdicts[t.reason] = verdicts.get(t.reason, 0) + 1
    table.add_row("ended", REASONS.get(outcome.reason, outcome.reason))
    table.add_row("trials", f"{state.decided} decided: " + (", ".join(f"{n} {r}" for r, n in sorted(verdicts.items()))
                                                          or "none"))
    taken_back = state.generation - len(state.standing)
    if state.generation:
        table.add_row("kept", f"{len(state.standing)} commit(s), claimed gain {claimed_gain(state):.4f} bpb in all "
                              "(selected, so flattering)")
        honest = honest_gain(state)
        if honest:
            table.add_row("honest gain", f"{honest[0]:+.4f} +- {honest[1]:.4f} bpb: every keep against its parent on "
                                         "fresh seeds")
        elif state.standing:
            table.add_row("honest gain", "not measured yet: fresh seeds are run when the search goes on")
        means = control_means(state)
        if means:
            table.add_row("controls", f"{means[0]:.4f} -> {means[1]:.4f} val_bpb")
        if taken_back:
            table.add_row("taken back", f"{taken_back} commit(s) whose gain was not there on fresh seeds")
    elif not state.decided:
        table.add_row("kept", "none yet: no trial is decided")
    else:
        table.add_row("kept", "none: no change was shown to be better than the noise. That is a result, too")
    table.add_row("cost", f"{outcome.seconds / 60:.1f} minutes now; {state.seconds / 60:.1f} worker-minutes in all")
    return Panel(table, title=f"search {outcome.search}", title_align="left", border_style="blue")


def _next_steps(ws: Workspace, outcome: SearchOutcome) -> Text:
    demo = ws.root.name == DEMO_DIR
    at = f" -w {DEMO_DIR}" if demo else ""
    track = outcome.state.started[0].track if outcome.state.started else "pocket"
    name = "" if outcome.search == track else f" --name {outcome.search}"
    trial = _interesting(outcome.state)
    git = f"git -C {DEMO_DIR}" if demo else "git"
    rows = [
        ("the commits", f"{git} log --stat search/{outcome.search} -- {recipe_path(track)}" if outcome.state.kept
         else ""),
        ("a verdict in words", f"autoresearch gate explain {trial}{at}" if trial else ""),
        ("every event", f"autoresearch ledger tail{at}"),
        ("check the ledger", f"autoresearch ledger verify{at}"),
        ("go on", _go_on(outcome, track, name, demo)),
    ]
    rows = [row for row in rows if row[1]]
    text = Text("where to look next\n", style="bold")
    for what, command in rows:
        text.append(f"  {what:20s}", style="dim")
        text.append(f"{command}\n", style="default")
    if declared_track(track).meaningless:
        text.append(f"track {track} is for fault tests: its verdicts mean nothing\n", style="bold red")
    return text


def _go_on(outcome: SearchOutcome, track: str, name: str, demo: bool) -> str:
    """The command that continues: the same one after a stop, more trials after an end."""
    if demo and outcome.reason == "stopped":
        return "make demo   (it resumes)"
    command = f"autoresearch search --track {track}{name} --trials {outcome.state.decided + 8}"
    return command + ("   (in the checkout itself)" if demo else "")


def _interesting(state: SearchState) -> str:
    decided = [t.id for t in state.trials.values() if t.decided]
    return state.standing[-1].id if state.standing else (decided[-1] if decided else "")


def knob_dict(knob: Knob) -> dict[str, Any]:
    """A knob as JSON."""
    return {
        "name": knob.name, "type": knob.kind.__name__, "default": knob.default, "valid": knob.valid, "unit": knob.unit,
        "doc": knob.doc, "ladder": list(knob.ladder), "phase": knob.phase, "role": knob.role, "cost": knob.cost,
        "source": knob.source, "requires": [list(r) for r in knob.requires],
    }


def print_knobs(knobs: list[Knob]) -> None:
    """A table, or one knob in full."""
    out = console()
    if len(knobs) == 1:
        for key, value in knob_dict(knobs[0]).items():
            out.print(f"[bold]{key:9s}[/bold] {value}")
        return
    table = Table("knob", "default", "valid", "what it does", box=None, header_style="bold")
    for k in knobs:
        table.add_row(k.name, str(k.default), k.valid, k.doc)
    out.print(table)
