"""What ``ledger verify`` asks beyond the chain: every verdict recomputed, every kept commit held against git."""

from __future__ import annotations

from harness.gate.verdict import recompute
from harness.gitrepo import Repo
from harness.transaction import TRAILER_HEAD, TRAILER_TRIAL
from ledger.decode import Record
from ledger.problems import Problem, problem_at
from ledger.records import CommitDone, Decided, PreflightRefused
from ledger.verify import Check


def verdicts(records: list[Record]) -> list[Problem]:
    """Judge every recorded verdict again from its own figures."""
    found = []
    for record in records:
        if isinstance(record.body, Decided):
            found += [problem_at(record, "verdict", text) for text in recompute(record.body)]
        elif isinstance(record.body, PreflightRefused) and not record.body.reason:
            found.append(problem_at(record, "verdict", "a refusal without a reason"))
    return found


def commits(repo: Repo) -> Check:
    """A check over git: each committed keep exists and its trailers name the record that decided it."""

    def check(records: list[Record]) -> list[Problem]:
        by_seq = {r.seq: r for r in records}
        found = []
        for record in records:
            if not isinstance(record.body, CommitDone):
                continue
            sha = record.body.sha
            if repo.rev(sha) is None:
                found.append(problem_at(record, "commit", f"commit {sha[:12]} is not in this repository", "warning"))
                continue
            trailers = repo.trailers(sha)
            seq, _, h = trailers.get(TRAILER_HEAD, "").partition(":")
            witness = by_seq.get(int(seq)) if seq.isdigit() else None
            if trailers.get(TRAILER_TRIAL) != record.trial:
                found.append(problem_at(record, "commit", f"commit {sha[:12]} names trial "
                                        f"{trailers.get(TRAILER_TRIAL)!r}, the ledger {record.trial!r}"))
            elif witness is None or witness.h != h:
                found.append(problem_at(record, "commit", f"commit {sha[:12]} witnesses {TRAILER_HEAD} {seq}:{h[:12]}, "
                                        "which is not in this ledger: it was rewritten or cut"))
        return found

    return check
