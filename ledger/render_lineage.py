"""The tree of kept commits: drawn, as JSON, as a Mermaid chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ledger.draw import MARKS, VERDICT_WIDTH, WIDE, Adaptive, delta, trial_dict, widest
from ledger.queries import Node
from ledger.summary import change_text
from ledger.trials import TrialView

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text



@dataclass(frozen=True)
class _Row:
    """One line of the tree: the drawing left of the mark, and what it is about."""

    rail: str
    node: Node | None = None
    attempt: TrialView | None = None
    more: int = 0


def lineage_tree(roots: Sequence[Node], attempts: int | None = None) -> RenderableType:
    """Kept commits from the base downwards, what was tried on each and not kept beside the rail.

    A line of keeps runs straight down however long it is; only real branches are indented. ``attempts``
    limits how many are shown per commit (the latest), None shows all.
    """
    rows = [row for root in roots for row in _rows(root, "", attempts)]
    return Adaptive(lambda width: _lineage_grid(rows, width))


def _rows(root: Node, rail: str, limit: int | None) -> list[_Row]:
    heights = _heights(root)
    rows: list[_Row] = []
    node: Node | None = root
    while node is not None:
        main = max(node.children, key=lambda child: heights[id(child)], default=None)
        branches = [child for child in node.children if child is not main]
        rows.append(_Row(rail, node=node))
        beside = rail + ("│ " if main else "  ")
        shown = node.attempts if limit is None else node.attempts[max(0, len(node.attempts) - limit) :]
        if len(shown) < len(node.attempts):
            rows.append(_Row(beside, more=len(node.attempts) - len(shown)))
        rows += [_Row(beside, attempt=view) for view in shown]
        for branch in branches:
            rows += _rows(branch, beside, limit)
        node = main
    return rows


def _heights(root: Node) -> dict[int, int]:
    heights: dict[int, int] = {}
    for node in reversed(list(root.walk())):  # children before parents
        heights[id(node)] = 1 + max((heights[id(child)] for child in node.children), default=0)
    return heights


def _lineage_grid(rows: Sequence[_Row], width: int) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return Text("no trials yet: start with `autoresearch search`", style="dim")
    wide = width >= WIDE
    cells = [_lineage_cells(row, wide) for row in rows]
    grid = Table.grid(padding=(0, 2), expand=False)
    grid.add_column(no_wrap=True, min_width=widest((row[0].plain for row in cells), 28))
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1, max_width=72)
    grid.add_column(no_wrap=True, justify="right", min_width=7)
    grid.add_column(no_wrap=True, overflow="ellipsis", min_width=VERDICT_WIDTH)
    if wide:
        grid.add_column(no_wrap=True, justify="right")
        grid.add_column(no_wrap=True, justify="right")
        grid.add_column(no_wrap=True, style="dim")
    for row in cells:
        grid.add_row(*(row if wide else row[:4]))
    return grid


def _lineage_cells(row: _Row, wide: bool) -> list[Text]:
    from rich.text import Text

    rail = Text(row.rail, style="dim")
    view = row.attempt or (row.node.trial if row.node else None)
    if row.more:
        return [rail, Text(f"and {row.more} earlier", style="dim"), *(Text() for _ in range(5))]
    if view is None:
        assert row.node is not None
        head = rail + Text("○ ", style="bold") + Text(row.node.commit[:10], style="bold")
        return [head, Text("base"), Text(), Text(_measured(row.node, wide)), *(Text() for _ in range(3))]
    mark, style = MARKS[view.status]
    head = rail + Text(f"{mark} {view.trial}", style=style)
    reason = view.reason or view.status
    if row.node is not None:
        reason += f" {_measured(row.node, wide)}"
    return [
        head,
        Text(change_text(view), style="" if row.node else "dim"),
        delta(view.delta_bpb, 4),
        Text(reason, style=style),
        delta(view.delta_bytes, 0, " B"),
        delta(view.delta_step_pct, 1, "% time"),
        Text(row.node.commit[:10] if row.node else ""),
    ]


def _measured(node: Node, wide: bool) -> str:
    """Mean val_bpb of its fresh control runs, per fingerprint."""
    return ", ".join(f"{item.mean:.4f}" + (f" ({item.n} fresh)" if wide else "") for item in node.controls)


def lineage_dict(roots: Sequence[Node]) -> dict[str, Any]:
    """JSON-able: a flat list of commits, each with its parent's id ("" for a root), parents first."""
    nodes: list[dict[str, Any]] = []
    for root in roots:
        parents: dict[int, str] = {}
        for node in root.walk():
            parents.update({id(child): node.commit for child in node.children})
            nodes.append(
                {
                    "commit": node.commit,
                    "parent": parents.get(id(node), ""),
                    "trial": trial_dict(node.trial) if node.trial else None,
                    "controls": [asdict(item) for item in node.controls],
                    "attempts": [trial_dict(view) for view in node.attempts],
                }
            )
    return {"nodes": nodes}


def lineage_mermaid(roots: Sequence[Node]) -> str:
    """The kept commits as a Mermaid flow chart; attempts are counted, not drawn."""
    lines = ["flowchart TD"]
    for entry in lineage_dict(roots)["nodes"]:
        trial, tried = entry["trial"], len(entry["attempts"])
        label = f"{entry['commit'][:10]} {trial['trial'] if trial else 'base'}"
        if trial and trial["delta_bpb"] is not None:
            label += f" {trial['delta_bpb']:+.4f}"
        label += f"<br/>{tried} tried, not kept" if tried else ""
        lines.append(f'    {_mermaid_id(entry["commit"])}["{label}"]')
        if entry["parent"]:
            lines.append(f"    {_mermaid_id(entry['parent'])} --> {_mermaid_id(entry['commit'])}")
    return "\n".join(lines) + "\n"


def _mermaid_id(commit: str) -> str:
    return "c" + "".join(char if char.isalnum() else "_" for char in commit)
