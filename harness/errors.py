"""Errors that are a person's to mend: shown as one clear message, exit code 2, no traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Names the thing, its value, what is valid and what to do."""


class InfraError(RuntimeError):
    """The machine's fault (disk, process limits, git): never blamed on an idea; exit code 1."""
