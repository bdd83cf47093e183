"""Check a whole ledger: bytes and chain, then sense (ids, times, bodies), then each trial's life cycle.

Whoever knows more plugs in: ``checks`` are functions over the records, such as recomputing every verdict
from its logged figures, or comparing ``Ledger-Head`` trailers in git with the chain.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ledger import chain, decode, lifecycle
from ledger.chain import Cursor
from ledger.decode import Record
from ledger.durable import explain
from ledger.errors import LedgerCorrupt
from ledger.problems import Problem
from ledger.records import BODIES, Envelope

__all__ = ["Check", "Problem", "Report", "verify"]

Check = Callable[[list[Record]], list[Problem]]

_UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Report:
    """What a verification found. ``problems`` are in file order; damage of the bytes comes first."""

    path: str
    records: int  # whole records with a good chain
    head_seq: int
    head: str
    types: dict[str, int]
    skipped: dict[str, int]
    torn_bytes: int  # bytes of an unfinished last line: mended by the next append
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No errors (warnings, such as a commit that the next start will finish, are allowed)."""
        return not any(problem.severity == "error" for problem in self.problems)

    @property
    def first(self) -> Problem | None:
        """The first error, by place in the file."""
        errors = [problem for problem in self.problems if problem.severity == "error"]
        return min(errors, key=lambda problem: (problem.line, problem.rule), default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "ok": self.ok}


def verify(path: Path, checks: Iterable[Check] = ()) -> Report:
    """Verify the ledger at ``path``; damage is reported, not raised. Nothing is written, no lock is taken.

    After damage of the bytes nothing behind it is looked at: it is no longer vouched for. Raises LedgerError
    if the file cannot be read (a missing one too: an empty ledger would be a false "all is well").
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise explain(error, path, "read") from error
    problems: list[Problem] = []
    offsets, envelopes, cursor, tail = _walk(data, path, problems)
    skipped: Counter[str] = Counter()
    records: list[Record] = []
    for envelope in envelopes:
        record = decode.decode(envelope, skipped)
        if record is not None:
            records.append(record)
        elif envelope.type in BODIES:
            problems.append(_at(envelope, "body", f"the body is not a {envelope.type} body of this version"))
    problems += _sense(envelopes)
    problems += lifecycle.check(records)
    for check in checks:
        problems += check(records)
    placed = [_place(problem, offsets) for problem in problems]
    return Report(
        path=str(path),
        records=len(envelopes),
        head_seq=cursor.seq,
        head=cursor.h,
        types=dict(Counter(envelope.type for envelope in envelopes)),
        skipped=dict(skipped),
        torn_bytes=len(tail),
        problems=sorted(placed, key=lambda problem: (problem.rule != "chain", problem.line)),
    )


def _walk(
    data: bytes, path: Path, problems: list[Problem]
) -> tuple[list[int], list[Envelope], Cursor, bytes]:
    """The good records from the start, where each begins, and the unfinished tail."""
    offsets: list[int] = []
    envelopes: list[Envelope] = []
    cursor = Cursor()
    try:
        while (end := data.find(b"\n", cursor.offset)) >= 0:
            envelope = chain.check_line(data[cursor.offset : end], cursor, path)
            envelopes.append(envelope)
            offsets.append(cursor.offset)
            cursor = Cursor(end + 1, envelope.seq, envelope.h)
        tail = data[cursor.offset :]
        if tail:
            chain.judge_tail(tail, cursor, path)
    except LedgerCorrupt as error:
        problems.append(Problem(rule="chain", reason=error.reason, line=error.line, offset=error.offset))
        tail = b""
    return offsets, envelopes, cursor, tail


def _place(problem: Problem, offsets: list[int]) -> Problem:
    if problem.offset >= 0 or not 1 <= problem.line <= len(offsets):
        return problem
    return Problem(**{**asdict(problem), "offset": offsets[problem.line - 1]})


def _at(envelope: Envelope, rule: str, reason: str, severity: str = "error") -> Problem:
    return Problem(rule=rule, reason=reason, line=envelope.seq + 1, trial=envelope.trial, severity=severity)


def _sense(envelopes: list[Envelope]) -> list[Problem]:
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for envelope in envelopes:
        if envelope.id in seen:
            reason = f"id {envelope.id} was already used in line {seen[envelope.id] + 1}"
            problems.append(_at(envelope, "id", reason))
        seen.setdefault(envelope.id, envelope.seq)
        if not _UUID7.fullmatch(envelope.id):
            problems.append(_at(envelope, "id", f"id {envelope.id!r} is not a UUIDv7"))
        if not _is_utc(envelope.ts):
            problems.append(_at(envelope, "time", f"ts {envelope.ts!r} is not a UTC time (RFC 3339)"))
    return problems


def _is_utc(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).utcoffset() == timedelta(0)
    except ValueError:
        return False
