"""``autoresearch promote``: measure a change on another track."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.common import JsonOption, PlainOption, WorkspaceOption, fail, guard, print_json, whole, workspace

if TYPE_CHECKING:
    from harness.promote import Transfer

EXAMPLE = "autoresearch promote pocket-0004 --to pocket-2x --pairs 4"


@guard
def promote(
    what: Annotated[
        str, typer.Argument(metavar="TRIAL|STACK", help="A decided trial, or stack:NAME: all that search NAME kept.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="TRACK", help="Where to measure it (see `track list`).")],
    pairs: Annotated[
        int, typer.Option("--pairs", parser=whole(2), metavar="N", help="Seeds; each is run on both sides.")
    ] = 4,
    search: Annotated[str, typer.Option("--search", metavar="NAME", help="The trial's search, if not plain.")] = "",
    json_: JsonOption = False,
    plain: PlainOption = False,
    where: WorkspaceOption = None,
) -> None:
    """Does it transfer? The change against its base on another track, measured seed by seed and recorded."""
    from harness.bench import Stopped
    from harness.promote import promote as measure
    from harness.views import PlainView, make_view

    ws = workspace(where)
    view = PlainView(sys.stderr) if json_ else make_view(plain)
    try:
        found = measure(ws, what, to, view, pairs=pairs, search=search)
    except Stopped:
        fail("stopped, nothing recorded yet; finished runs are kept: the same command goes on from there", 130)
    if json_:
        print_json(transfer_dict(found))
    else:
        print_transfer(found)


def transfer_dict(found: Transfer) -> dict[str, Any]:
    """A transfer as JSON: the record's fields, and the figures behind it where they were just measured."""
    import msgspec

    return {
        **msgspec.to_builtins(found.record), "seeds": found.seeds, "left_out": list(found.placed.left_out),
        "cap_bytes": found.cap_bytes, "measured_now": not found.known,
        "runs": {side: [msgspec.to_builtins(r) for r in runs] for side, runs in found.runs.items()},
    }


def print_transfer(found: Transfer) -> None:
    """A table by seed, the interval, the verdict in words, and what to know about it."""
    from rich.table import Table

    from harness.report import console

    record = found.record
    base, candidate = (found.runs.get(side, ()) for side in ("base", "candidate"))
    table = Table(title=f"{record.subject}: {record.source_track} -> {record.track}", title_justify="left")
    for head in ("pair", "seed", *(("base bpb", "candidate bpb") if base else ()), "gain bpb"):
        table.add_column(head, justify="right", no_wrap=True)
    for i, gain in enumerate(record.differences):
        bpb = (f"{base[i].val_bpb:.4f}", f"{candidate[i].val_bpb:.4f}") if base else ()
        table.add_row(f"#{record.ks[i]}", str(found.seeds[i]), *bpb, f"{gain:+.4f}")
    out = console()
    out.print(table)
    for line in words(found):
        out.print(line, markup=False, soft_wrap=True)


def words(found: Transfer) -> list[str]:
    """What the measurement says, one line each."""
    from harness.tracks import declared_track
    from ledger.trials import total_bytes

    r = found.record
    before = {**found.subject.source.resolve(found.subject.base)}
    lines = [f"{k}: {found.placed.base[k]} -> {v} on {r.track} ({before[k]} -> {v} on {r.source_track})"
             for k, v in r.change.items()]
    source = "not measured" if r.source_gain is None else f"{r.source_gain:+.4f}"
    lines += [
        f"gain on {r.track}: {r.gain:+.4f} bpb (standard error {r.se:.4f}, 90% interval {r.low:+.4f} to {r.high:+.4f}, "
        f"{len(r.ks)} pairs); on {r.source_track}: {source}",
        f"bytes {r.delta_bytes:+,}, step time {r.delta_step_pct:+.1f}%",
        f"verdict: {r.verdict}" + {"unclear": f"; more pairs would tell: --pairs {2 * len(r.ks)}"}.get(r.verdict, ""),
    ]
    if found.placed.left_out:
        lines.append(f"left out of both sides, because {r.track} fixes them: {', '.join(found.placed.left_out)}")
    largest = max(map(total_bytes, found.runs.get("candidate", ())), default=0)
    if largest > found.cap_bytes:
        lines.append(f"the candidate's artifact is over the cap there: {largest:,} of {found.cap_bytes:,} bytes")
    if declared_track(r.track).meaningless:
        lines.append(f"track {r.track} is for fault tests: its verdicts mean nothing")
    if found.known:
        lines.append("measured before: this is the ledger's record, nothing was run")
    return lines
