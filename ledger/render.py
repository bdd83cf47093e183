"""The ledger for people (rich renderables, readable at 80 columns, fuller when wide) and for programs (dicts).

rich is imported when something is drawn, so that reading a ledger costs no more than reading a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import msgspec

from ledger.decode import Record
from ledger.draw import MARKS, VERDICT_WIDTH, WIDE, Adaptive, cost, delta, trial_dict, widest
from ledger.queries import Best
from ledger.records import Decided
from ledger.render_lineage import lineage_dict, lineage_mermaid, lineage_tree
from ledger.summary import change_text, signed, summarise
from ledger.trials import TrialView

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

__all__ = [
    "best_dict",
    "best_table",
    "change_text",
    "lineage_dict",
    "lineage_mermaid",
    "lineage_tree",
    "record_dict",
    "record_lines",
    "trial_dict",
    "trial_panel",
    "trial_table",
]

# -- trials --------------------------------------------------------------------------------------


def trial_table(views: Sequence[TrialView]) -> RenderableType:
    """One line per trial, oldest first."""
    return Adaptive(lambda width: _trial_grid(views, width))


def _trial_grid(views: Sequence[TrialView], width: int) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    if not views:
        return Text("no trials", style="dim")
    wide = width >= WIDE
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("trial", no_wrap=True, min_width=widest((view.trial for view in views), 26) + 2)
    table.add_column("change", no_wrap=True, overflow="ellipsis", ratio=1, max_width=72)
    table.add_column("Δ bpb", no_wrap=True, justify="right", min_width=7)
    table.add_column("verdict", no_wrap=True, overflow="ellipsis", min_width=VERDICT_WIDTH)
    if wide:
        for name in ("val_bpb", "Δ bytes", "Δ time", "runs", "cost"):
            table.add_column(name, no_wrap=True, justify="right")
        table.add_column("line", no_wrap=True, overflow="ellipsis", max_width=16)
    for view in views:
        mark, style = MARKS[view.status]
        cells = [
            Text(f"{mark} {view.trial}", style=style),
            Text(change_text(view)),
            delta(view.delta_bpb, 4),
            Text(view.reason or view.status, style=style),
        ]
        if wide:
            cells += [
                Text("" if view.candidate_bpb is None else f"{view.candidate_bpb:.4f}"),
                delta(view.delta_bytes, 0),
                delta(view.delta_step_pct, 1, "%"),
                Text(str(view.runs or "")),
                Text(cost(view)),
                Text(view.line, style="dim"),
            ]
        table.add_row(*cells)
    return table


def trial_panel(view: TrialView, records: Iterable[Record] = ()) -> Panel:
    """All about one trial. With its records: run by run figures, checks, and the events in time."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    mark, style = MARKS[view.status]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in _facts(view):
        grid.add_row(name, value if isinstance(value, Text) else Text(value))
    parts: list[RenderableType] = [grid]
    mine = [record for record in records if record.trial == view.trial and record.search == view.search]
    verdict = next((record.body for record in mine if isinstance(record.body, Decided)), None)
    if verdict is not None:
        parts += [Text(), _pairs(verdict)]
        for check in verdict.checks:
            word = Text("  passed  " if check.passed else "  FAILED  ", style="green" if check.passed else "red")
            parts.append(word + Text(f"{check.name}: {check.detail}", style="default"))
    if mine:
        parts += [Text(), record_lines(mine)]
    title = Text(f"{mark} {view.trial}  {view.status}", style=style)
    return Panel(Group(*parts), title=title, title_align="left", border_style=style.replace("bold ", ""))


def _facts(view: TrialView) -> list[tuple[str, str | Text]]:
    """Label and value of everything that is known, in reading order."""
    figures: list[str] = []
    if view.candidate_bpb is not None and view.control_bpb is not None:
        figures.append(f"{view.candidate_bpb:.4f} against {view.control_bpb:.4f} bpb over {view.pairs} pairs")
    if view.sigma is not None:
        figures.append(f"sigma of a difference {view.sigma:.4f}")
    size = "" if view.bytes is None else f"{view.bytes:,}"
    if view.delta_bytes is not None:
        size += f" ({signed(view.delta_bytes, 0)} against the incumbent)"
    commit = f"{view.commit[:12]} ({view.commit_state})" if view.commit else view.commit_state
    facts: list[tuple[str, str | Text]] = [
        ("change", change_text(view)),
        ("hypothesis", view.hypothesis),
        ("proposed by", f"{view.agent}, line {view.line}{f', move {view.move}' if view.move else ''}"),
        ("verdict", f"{view.reason or view.status}{f' at {view.stage}' if view.stage else ''}"),
        ("why", view.explanation),
        ("Δ bpb", delta(view.delta_bpb, 5)),
        ("val_bpb", ", ".join(figures)),
        ("bytes", size),
        ("step time", "" if view.delta_step_pct is None else f"{signed(view.delta_step_pct, 1)}%"),
        ("commit", commit),
        ("parent", f"{view.parent_commit[:12]} (generation {view.generation})"),
        ("retry of", view.retry_of),
        ("cost", cost(view)),
        ("lesson", view.lesson),
    ]
    return [(name, value) for name, value in facts if value]


def _pairs(verdict: Decided) -> Table:
    """Candidate and control side by side, seed by seed."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("k", "seed", "control", "candidate", "difference", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    controls = {run.k: run for run in verdict.control}
    candidates = {run.k: run for run in verdict.candidate}
    for k in sorted(controls.keys() | candidates.keys()):
        left, right = controls.get(k), candidates.get(k)
        seeds = {run.seed for run in (left, right) if run}
        table.add_row(
            str(k),
            "/".join(str(seed) for seed in sorted(seeds)),
            f"{left.val_bpb:.5f}" if left else "",
            f"{right.val_bpb:.5f}" if right else "",
            delta(right.val_bpb - left.val_bpb, 5) if left and right else Text(),
            f"{right.artifact_bytes + right.code_bytes:,}" if right else "",
        )
    return table


# -- leaders and records -------------------------------------------------------------------------


def best_dict(leader: Best) -> dict[str, Any]:
    """JSON-able."""
    return {**asdict(leader), "trial": trial_dict(leader.trial) if leader.trial else None}


def best_table(leaders: Sequence[Best]) -> RenderableType:
    """One line per measurement fingerprint: figures of different lines are never compared."""
    from rich.table import Table
    from rich.text import Text

    if not leaders:
        return Text("nothing measured yet", style="dim")
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("track", "commit", "trial"):
        table.add_column(name, no_wrap=True)
    for name in ("val_bpb", "runs", "claimed gain", "honest gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in leaders:
        flag = "" if item.fresh else " selected"
        honest = "not measured" if item.honest_gain is None else signed(item.honest_gain, 4)
        if item.paired_gain is not None and item.paired_se is not None:
            honest = f"{signed(item.paired_gain, 4)} ± {item.paired_se:.4f}"
        table.add_row(
            item.track,
            item.commit[:10],
            item.trial.trial if item.trial else "base",
            f"{item.val_bpb:.4f}{flag}",
            str(item.runs),
            signed(item.claimed_gain, 4),
            honest,
        )
    return table


def record_dict(record: Record) -> dict[str, Any]:
    """JSON-able: the record as it stands in the file, unknown fields left out."""
    return msgspec.to_builtins(record)


def record_lines(records: Iterable[Record]) -> RenderableType:
    """One line per record: number, time (UTC), type, trial (where there are several), what it says."""
    items = list(records)
    return Adaptive(lambda width: _record_grid(items, width))


def _record_grid(records: Sequence[Record], width: int) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    when = slice(5, 19) if width >= WIDE else slice(11, 16)  # month to seconds, or hour and minute
    several = len({record.trial for record in records}) > 1
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", style="dim", no_wrap=True, min_width=widest((str(r.seq) for r in records), 9))
    grid.add_column(style="dim", no_wrap=True, min_width=when.stop - when.start)
    grid.add_column(style="cyan", no_wrap=True, min_width=widest((record.type for record in records), 17))
    if several:
        grid.add_column(no_wrap=True, min_width=widest((record.trial for record in records), 26))
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for record in records:
        names = [record.type, record.trial] if several else [record.type]
        cells = [str(record.seq), record.ts[when].replace("T", " "), *names, summarise(record)]
        grid.add_row(*(Text(cell) for cell in cells))
    return grid
