"""The command line: one file per noun. ``main`` is the entry point of ``autoresearch``.

Heavy imports live inside the commands, so that ``autoresearch --help`` answers at once.
"""

from __future__ import annotations

import typer

from harness.cli import calibrate, data, gate, ledger, promote, run, track

app = typer.Typer(
    name="autoresearch",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Unattended compact-language-model research: propose one change, measure it honestly, keep what is real.",
    epilog="Start with: autoresearch demo (about ten minutes on two CPU cores; touches nothing of yours)",
)
run.register(app)
app.command(epilog=f"Example: {promote.EXAMPLE}")(promote.promote)
app.add_typer(data.app, name="data")
app.add_typer(ledger.app, name="ledger")
for name in ("calibrate", "panel"):
    gate.app.command(epilog=f"Example: autoresearch gate {name} --track pocket")(getattr(calibrate, name))
app.add_typer(gate.app, name="gate")
app.add_typer(track.app, name="track")


def main() -> None:
    """Run the command line."""
    app()


__all__ = ["app", "main"]
