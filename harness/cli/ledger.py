"""``autoresearch ledger``: what happened, who leads, and whether the log can be trusted."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from harness.cli.common import JsonOption, WorkspaceOption, guard, print_json, whole, workspace
from harness.errors import UserError

app = typer.Typer(no_args_is_help=True, help="What happened, who leads, and whether the log can be trusted.")

SearchFilter = Annotated[str | None, typer.Option("--search", help="Only this search.")]


def _records(where: str | None, search: str | None = None) -> list[Any]:
    from ledger.store import Ledger

    ws = workspace(where)
    if not ws.ledger.is_file():
        raise UserError(f"{ws.ledger}: no ledger yet; `autoresearch search` or `autoresearch demo` starts one")
    found = list(Ledger(ws.ledger).records(search=search))
    if search is not None and not found:
        raise UserError(f"--search {search}: no such search in {ws.ledger}")
    return found


def _print(renderable: Any) -> None:
    from harness.report import console

    console().print(renderable)


@app.command(epilog="Example: autoresearch ledger show pocket-0003")
@guard
def show(
    trial: Annotated[str | None, typer.Argument(help="A trial id; without it, every trial in a table.")] = None,
    search: SearchFilter = None,
    json_: JsonOption = False,
    where: WorkspaceOption = None,
) -> None:
    """All trials in a table, or one with its hypothesis, figures and verdict."""
    from ledger.queries import trials
    from ledger.render import trial_dict, trial_panel, trial_table

    records = _records(where, search)
    views = trials(records)
    if trial is None:
        if json_:
            print_json([trial_dict(v) for v in views])
        else:
            _print(trial_table(views))
        return
    view = next((v for v in views if v.trial == trial), None)
    if view is None:
        known = ", ".join(v.trial for v in views[-5:]) or "none yet"
        raise UserError(f"{trial}: no such trial; the last ones are: {known}")
    if json_:
        print_json(trial_dict(view))
    else:
        _print(trial_panel(view, records))


@app.command(epilog="Example: autoresearch ledger tail -n 30")
@guard
def tail(
    n: Annotated[int, typer.Option("-n", parser=whole(1), metavar="N", help="How many events.")] = 20,
    search: SearchFilter = None,
    json_: JsonOption = False,
    where: WorkspaceOption = None,
) -> None:
    """The last events."""
    from ledger.queries import tail as last
    from ledger.render import record_dict, record_lines

    records = last(_records(where, search), n)
    if json_:
        import json

        for record in records:
            print(json.dumps(record_dict(record), ensure_ascii=False, allow_nan=False))
    else:
        _print(record_lines(records))


@app.command(epilog="Example: autoresearch ledger verify")
@guard
def verify(json_: JsonOption = False, where: WorkspaceOption = None) -> None:
    """Check chain and life cycles, every verdict again, and figures and commits against git; exit 1 on a problem."""
    from harness.audit import checks
    from harness.gitrepo import Repo
    from ledger.verify import verify as check

    ws = workspace(where)
    if not ws.ledger.is_file():
        raise UserError(f"{ws.ledger}: no ledger yet; `autoresearch search` or `autoresearch demo` starts one")
    report = check(ws.ledger, checks(Repo(ws.main), ws.ledger))
    if json_:
        print_json(report.to_dict())
    else:
        for problem in report.problems:
            at = f"line {problem.line}, byte {problem.offset}: " if problem.line else ""
            trial = f" [{problem.trial}]" if problem.trial else ""
            print(f"{problem.severity}: {at}{problem.reason} ({problem.rule}){trial}")
        if report.torn_bytes:
            print(f"note: {report.torn_bytes} bytes of an unfinished last line; the next append mends it")
        word = "sound" if report.ok else "NOT SOUND"
        print(f"{ws.ledger}: {word}, {report.records} records, head {report.head_seq}:{report.head[:16]}")
    if not report.ok:
        raise typer.Exit(1)


@app.command(epilog="Example: autoresearch ledger lineage --mermaid")
@guard
def lineage(
    search: SearchFilter = None,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="As a Mermaid flow chart.")] = False,
    json_: JsonOption = False,
    where: WorkspaceOption = None,
) -> None:
    """The tree of kept commits, with what was tried on each and not kept."""
    from ledger.queries import lineage as tree
    from ledger.render_lineage import lineage_dict, lineage_mermaid, lineage_tree

    roots = tree(_records(where, search), search)
    if json_:
        print_json(lineage_dict(roots))
    elif mermaid:
        print(lineage_mermaid(roots))
    else:
        _print(lineage_tree(roots))


@app.command(epilog="Example: autoresearch ledger best --track pocket")
@guard
def best(
    track: Annotated[str | None, typer.Option("--track", help="Only this track.")] = None,
    search: SearchFilter = None,
    json_: JsonOption = False,
    where: WorkspaceOption = None,
) -> None:
    """The leader under every fingerprint, with its claimed and its honest gain."""
    from ledger.queries import best as leaders
    from ledger.render import best_dict, best_table

    found = leaders(_records(where, search), track=track, search=search)
    if json_:
        print_json([best_dict(b) for b in found])
    elif not found:
        print("no incumbent has been measured yet")
    else:
        _print(best_table(found))


@app.command(epilog="Example: autoresearch ledger publish")
@guard
def publish(where: WorkspaceOption = None) -> None:
    """Commit the ledger file to the checked-out branch, so that others get the history with the code."""
    from harness.gitrepo import open_repo
    from harness.workspace import LEDGER_FILE

    ws = workspace(where)
    if not ws.ledger.is_file():
        raise UserError(f"{ws.ledger}: no ledger yet; there is nothing to publish")
    sha = open_repo(ws.main).commit_file(LEDGER_FILE, "Publish the ledger")
    print(f"committed as {sha[:12]}" if sha else "the ledger is published already: nothing to commit")
