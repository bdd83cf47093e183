"""What verification reports."""

from __future__ import annotations

from dataclasses import dataclass

from ledger.decode import Record


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong. ``line`` is 1-based (0: no single line); ``offset`` -1 until it is known."""

    rule: str  # chain | id | time | body | lifecycle | commit | search | <the check's own>
    reason: str
    line: int = 0
    offset: int = -1
    trial: str = ""
    severity: str = "error"  # error | warning

    def __str__(self) -> str:
        where = f"line {self.line}" + (f" (byte {self.offset})" if self.offset >= 0 else "")
        trial = f", trial {self.trial}" if self.trial else ""
        return f"{self.severity}: {where}{trial}: {self.rule}: {self.reason}"


def problem_at(record: Record, rule: str, reason: str, severity: str = "error") -> Problem:
    """A problem of one record."""
    return Problem(rule=rule, reason=reason, line=record.seq + 1, trial=record.trial, severity=severity)
