"""``autoresearch gate``: ask the gate why, and what its error rates are."""

from __future__ import annotations

from typing import Annotated

import typer

from harness.cli.common import WorkspaceOption, guard, workspace
from harness.errors import UserError

app = typer.Typer(no_args_is_help=True, help="Explain verdicts, show the policy.")


@app.command(epilog="Example: autoresearch gate explain pocket-0003")
@guard
def explain(trial: Annotated[str, typer.Argument(help="Trial id.")], where: WorkspaceOption = None) -> None:
    """Why a trial was kept or rejected, in plain words, with every figure."""
    from harness.gate.explain import explain as words
    from ledger.records import Decided
    from ledger.store import Ledger

    ws = workspace(where)
    found = [r.body for r in Ledger(ws.ledger).records(types=["decided"], trial=trial)]
    if not found:
        raise UserError(f"{trial}: no verdict with that trial id in {ws.ledger} (see `autoresearch ledger show`)")
    body = found[-1]
    assert isinstance(body, Decided)
    print(words(body))
