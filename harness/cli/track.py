"""``autoresearch track``: the measurement protocols, and which of them this machine can run."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.common import JsonOption, WorkspaceOption, guard, print_json, workspace

if TYPE_CHECKING:
    from harness.tracks import Track
    from harness.workspace import Workspace

app = typer.Typer(no_args_is_help=True, help="Measurement protocols: what they are, and which can run here.")


@app.command(name="list", epilog="Example: autoresearch track list")
@guard
def list_(json_: JsonOption = False, where: WorkspaceOption = None) -> None:
    """Every track: what it is for, its runs, and what this machine lacks for it."""
    from rich.table import Table

    from harness.report import console
    from harness.tracks import load_tracks

    ws = workspace(where)
    rows = [track_dict(ws, t) for t in load_tracks().values()]
    if json_:
        print_json(rows)
        return
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for head in ("track", "for", "steps", "here"):
        table.add_column(head, overflow="fold")
    for row in rows:
        steps = f"{row['protocol']['breadth_steps']:,} / {row['protocol']['confirm_steps']:,}"
        lacks = "; ".join(text.partition(",")[0] for text in row["missing"])
        table.add_row(row["name"], row["title"], steps, lacks or "ready")
    console().print(table)


@app.command(epilog="Example: autoresearch track show gpu-proxy")
@guard
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A track (see `track list`).")],
    json_: JsonOption = False,
    where: WorkspaceOption = None,
) -> None:
    """One track in full: protocol, limits, fingerprint parts known here, and what this machine lacks."""
    from harness.tracks import PARTS, declared_track

    ws = workspace(where)
    row = track_dict(ws, declared_track(name, "track"))
    if json_:
        print_json(row)
        return
    print(f"{row['name']}: {row['title']}")
    if row["base"]:
        print(f"derived from {row['base']} ({', '.join(f'{k} {v}' for k, v in row['changes'].items())}): {row['why']}")
    for head in ("protocol", "limits"):
        print(f"\n{head}" + (" (numbers compare only where all of this is equal)" if head == "protocol" else ""))
        for key, value in row[head].items():
            shown = ", ".join(f"{k} = {v}" for k, v in value.items()) or "none" if isinstance(value, dict) else value
            print(f"  {key:22s}  {shown}")
    print("\nfingerprint parts known here")
    for key, value in row["parts"].items():
        print(f"  {key:22s}  {value[:16] or 'known when a search starts'}  {PARTS[key]}")
    print("\nhere: " + ("\n      ".join(row["missing"]) or "ready"))


def track_dict(ws: Workspace, track: Track) -> dict[str, Any]:
    """A track as JSON. ``parts``: of its fingerprint, "" where only a search finds out."""
    from harness.tracks import NOT_PROTOCOL, data_problem, declared_track, device_problem, fingerprint, protocol_changes

    words = {"name", "title", "base", "why"}
    fields = dataclasses.asdict(track)
    data, evaluator = known_hashes(ws, track)
    parts, lacks_device = fingerprint(track, data, evaluator)[1], device_problem(track)
    if lacks_device:
        parts["environment"] = ""  # a machine that cannot run it says nothing about one that can
    return {
        "name": track.name, "title": track.title, "base": track.base, "why": track.why,
        "changes": protocol_changes(declared_track(track.base), track) if track.base else {},
        "policy": track.policy_track,
        "protocol": {k: v for k, v in fields.items() if k not in NOT_PROTOCOL | words},
        "limits": {k: v for k, v in fields.items() if k in NOT_PROTOCOL - words},
        "parts": parts,
        "missing": [p for p in (lacks_device, data_problem(track, ws.data)) if p],
    }


def known_hashes(ws: Workspace, track: Track) -> tuple[str, str]:
    """(data, evaluator) hashes as they stand in this checkout; "" for data that is not there, or damaged."""
    from harness.data import EMBEDDED, embedded_dir
    from trainer.data.errors import DataError
    from trainer.data.layout import open_folder
    from trainer.tree import evaluator_hash

    folder = embedded_dir(ws) if track.data == EMBEDDED else ws.data / track.data
    try:
        data = open_folder(folder).fingerprint if folder.is_dir() else ""
    except DataError:
        data = ""
    return data, evaluator_hash(ws.root / "trainer")
