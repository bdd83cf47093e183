"""What all commands share: options, errors as messages, output as JSON, CSV or rich."""

from __future__ import annotations

import errno
import functools
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer

from harness.errors import InfraError, UserError
from harness.output import say, settle
from harness.workspace import Workspace, find_workspace

P = ParamSpec("P")
R = TypeVar("R")

WorkspaceOption = Annotated[
    str | None,
    typer.Option("--workspace", "-w", metavar="DIR", help="Git checkout to act on. Default: around this folder."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
PlainOption = Annotated[bool, typer.Option("--plain", help="Plain lines instead of the live panel.")]


MACHINE_ERRNOS = frozenset({errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS})
MAX_SEED = 2**63 - 1
"""The ledger and the trainer keep seeds in 63 bits."""


def whole(low: int, high: int | None = None) -> Callable[[Any], int]:
    """A parser for whole numbers from ``low`` (to ``high``) that says what was given and what is valid."""
    valid = f"from {low} up" if high is None else f"from {low} to {high}"

    def number(text: Any) -> int:
        try:
            value = int(str(text))
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise typer.BadParameter(f"{text!r} is not a whole number {valid}")
        return value

    return number


def user_errors() -> tuple[type[Exception], ...]:
    """Exceptions that are a person's to mend: message on stderr, exit code 2."""
    from agent.knowledge import KnowledgeError
    from agent.proposers import ProposerError
    from agent.proposers.manual import ManualError
    from harness.gate.checks import GateError
    from harness.gate.noise import NoiseError
    from harness.gate.policy import PolicyError
    from ledger.errors import LedgerError
    from trainer.contract import ContractError
    from trainer.data.errors import DataError
    from trainer.knobs import KnobError

    return (
        UserError, KnobError, ContractError, LedgerError, PolicyError, NoiseError, DataError, KnowledgeError,
        ManualError, ProposerError, GateError,
    )


def guard(command: Callable[P, R]) -> Callable[P, R]:
    """Show a known error as one message; 2 = the user's to mend, 1 = the machine's, 130 = interrupted.

    A reader of our output who leaves early (``| head``) is no error: 0, or what the command itself says.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            try:
                return command(*args, **kwargs)
            finally:
                settle(sys.stdout)
        except BrokenPipeError:
            raise typer.Exit(0) from None
        except SystemExit as e:
            if isinstance(e.__context__, BrokenPipeError):  # what rich makes of one
                raise typer.Exit(0) from None
            raise
        except InfraError as e:
            fail(str(e), 1)
        except OSError as e:
            reason = e.strerror or str(e) or type(e).__name__
            fail(f"{e.filename}: {reason}" if e.filename else reason, 1)
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except Exception as e:
            if not isinstance(e, user_errors()):
                raise
            fail(str(e), 1 if by_machine(e) else 2)
    return run


def by_machine(error: BaseException) -> bool:
    """Whether an error was caused by a full, failing or read-only disk rather than by what was asked."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in MACHINE_ERRNOS:
            return True
        cause = cause.__cause__
    return False


def fail(message: str, code: int) -> NoReturn:
    """Print an error to stderr and leave with ``code``."""
    say(f"autoresearch: {message}", sys.stderr)
    raise typer.Exit(code)


def workspace(given: str | None) -> Workspace:
    """The workspace to act on."""
    return find_workspace(given)


def print_json(data: Any) -> None:
    """JSON to stdout, one document."""
    print(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False))
