"""`verify`: lawful histories pass, every breach of the rules is named with its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ledger.decode import Record
from ledger.errors import LedgerError
from ledger.records import (
    Body,
    CommitDone,
    CommitIntent,
    CommitVoid,
    Note,
    PreflightRefused,
    SearchEnded,
    StageEnded,
    StageStarted,
    TrialAbandoned,
    TrialFailed,
)
from ledger.store import Ledger
from ledger.verify import Problem, verify
from tests.ledger.plain import forge_after
from tests.ledger.samples import BASE, EVERY, decided, figures, intent, passed, proposed, run_trial, search_started

Put = Callable[[str, Body], None]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / "ledger.jsonl")
    made.append("search.started", search_started(), search="night")
    return made


def put(ledger: Ledger, trial: str = "t1", search: str = "night") -> Put:
    return lambda type, body: ledger.append(type, body, search=search, trial=trial) and None


def errors(ledger: Ledger) -> list[tuple[int, str, str]]:
    found = [p for p in verify(ledger.path).problems if p.severity == "error"]
    return [(p.line, p.rule, p.reason) for p in found]


def test_lawful_trials_pass(ledger: Ledger) -> None:
    run_trial(ledger, "t1", 1, decided("reject"))
    run_trial(ledger, "t2", 2, decided("keep"), sha="2" * 40)
    for number, end in enumerate(
        [
            PreflightRefused(reason="rejected.duplicate", detail="as t1"),
            TrialFailed(reason="failed.crash", stage="preflight", detail="exit 1"),
            TrialAbandoned(reason="stopped"),
        ]
    ):
        trial = put(ledger, f"t{number + 3}")
        trial("trial.proposed", proposed(number + 3))
        trial({0: "preflight.refused", 1: "trial.failed", 2: "trial.abandoned"}[number], end)
    ledger.append("finding", EVERY["finding"], search="night", trial="t1")
    ledger.append("note", Note(text="afterwards"), search="night", trial="t2")
    run_trial(ledger, "t6", 6, decided("keep"))
    last = put(ledger, "t6")
    last("commit.intent", intent("6" * 40))
    last("commit.void", CommitVoid(sha="6" * 40, reason="the branch moved"))
    ledger.append("search.ended", SearchEnded(reason="stopped", decided=3, kept=1, seconds=9.0), search="night")
    report = verify(ledger.path)
    assert report.problems == [] and report.ok and report.first is None
    assert (report.head_seq, report.head) == ledger.head()
    assert report.records == sum(report.types.values()) == ledger.head()[0] + 1
    json.dumps(report.to_dict())


def test_the_same_trial_id_in_two_searches_is_two_trials(ledger: Ledger) -> None:
    ledger.append("search.started", search_started(), search="day")
    run_trial(ledger, "t1", 1, decided("reject"))
    run_trial(ledger, "t1", 1, decided("reject"), search="day")
    assert errors(ledger) == []


KEPT = decided("keep")
BREACHES: list[tuple[str, list[tuple[str, Body]], int, str]] = [
    ("confirm before preflight", [("confirm.started", StageStarted(k=0, seed=1, run_id="r"))], 0, "before preflight"),
    ("ended without start", [("preflight.passed", passed()), ("breadth.ended", StageEnded(run=figures("r")))], 1,
     "without having started"),
    ("ended twice", [
        ("preflight.passed", passed()),
        ("breadth.started", StageStarted(k=0, seed=1, run_id="r")),
        ("breadth.ended", StageEnded(run=figures("r"))),
        ("breadth.ended", StageEnded(run=figures("r"))),
    ], 3, "ended twice"),
    ("proposed twice", [("trial.proposed", proposed())], 0, "already proposed"),
    ("two verdicts", [("preflight.passed", passed()), ("decided", decided("reject")), ("decided", KEPT)], 2,
     "a second end"),
    ("a verdict after failure", [
        ("trial.failed", TrialFailed(reason="failed.oom", stage="breadth", detail="")),
        ("decided", decided("reject")),
    ], 1, "after trial.failed"),
    ("work after the end", [
        ("preflight.refused", PreflightRefused(reason="rejected.bytes", detail="")),
        ("preflight.passed", passed()),
    ], 1, "after preflight.refused"),
    ("an unknown verdict", [("preflight.passed", passed()), ("decided", decided("maybe"))], 1,
     "neither keep nor reject"),
    ("keep for a rejecting reason", [
        ("preflight.passed", passed()), ("decided", decided("keep", reason="rejected.noise")),
        ("commit.intent", intent()), ("commit.done", CommitDone(sha="1" * 40, branch="b")),
    ], 1, "verdict keep with reason"),
    ("reject for a keeping reason", [("preflight.passed", passed()),
                                     ("decided", decided("reject", reason="kept.gain"))], 1,
     "verdict reject with reason"),
    ("kept unseen", [("decided", decided("keep")), ("commit.intent", intent()),
                     ("commit.done", CommitDone(sha="1" * 40, branch="b"))], 0, "kept without preflight"),
    ("kept unmeasured", [("preflight.passed", passed()), ("decided", msgspec.structs.replace(KEPT, candidate=[]))], 1,
     "kept without any confirm run"),
    ("commit without a keep", [("preflight.passed", passed()), ("decided", decided("reject")),
                               ("commit.intent", intent())], 2, "without a keep"),
    ("two intents", [("preflight.passed", passed()), ("decided", KEPT), ("commit.intent", intent()),
                     ("commit.intent", intent())], 3, "second commit.intent"),
    ("done without intent", [("preflight.passed", passed()), ("decided", KEPT),
                             ("commit.done", CommitDone(sha="1" * 40, branch="b"))], 2, "without commit.intent"),
    ("another sha", [("preflight.passed", passed()), ("decided", KEPT), ("commit.intent", intent()),
                     ("commit.done", CommitDone(sha="2" * 40, branch="b"))], 3, "the intent 1111"),
    ("done and void", [("preflight.passed", passed()), ("decided", KEPT), ("commit.intent", intent()),
                       ("commit.done", CommitDone(sha="1" * 40, branch="b")),
                       ("commit.void", CommitVoid(sha="1" * 40, reason=""))], 4, "already settled"),
    ("a failure without a class", [("trial.failed", TrialFailed(reason="oops", stage="", detail=""))], 0, "failed.*"),
]


@pytest.mark.parametrize(("events", "where", "words"), [b[1:] for b in BREACHES], ids=[b[0] for b in BREACHES])
def test_breaches_of_the_life_cycle(
    ledger: Ledger, events: list[tuple[str, Body]], where: int, words: str
) -> None:
    trial = put(ledger)
    trial("trial.proposed", proposed())
    for type, body in events:
        trial(type, body)
    found = errors(ledger)
    assert any(line == 4 + where and words in reason for line, _, reason in found), found
    assert not verify(ledger.path).ok


def test_a_trial_that_was_never_proposed(ledger: Ledger) -> None:
    put(ledger)("preflight.passed", passed())
    put(ledger, trial="")("trial.abandoned", TrialAbandoned(reason=""))
    assert [(line, words) for line, _, words in errors(ledger)] == [
        (3, "preflight.passed before trial.proposed"),
        (4, "trial.abandoned names no trial"),
    ]


def test_a_search_that_ends_unstarted(ledger: Ledger) -> None:
    ledger.append("search.ended", SearchEnded(reason="x", decided=0, kept=0, seconds=0.0), search="never")
    ((line, rule, _),) = errors(ledger)
    assert (line, rule) == (3, "search")


def test_an_owed_commit_is_a_warning_until_the_search_goes_on(ledger: Ledger) -> None:
    run_trial(ledger, "t1", 1, decided("keep"))
    report = verify(ledger.path)
    assert report.ok and [p.severity for p in report.problems] == ["warning"]
    put(ledger, "t1")("commit.intent", intent())
    assert verify(ledger.path).ok
    run_trial(ledger, "t2", 2, decided("reject"))
    ((_, rule, reason),) = errors(ledger)
    assert rule == "commit" and "the search went on" in reason
    put(ledger, "t1")("commit.done", CommitDone(sha="1" * 40, branch="b"))
    assert not verify(ledger.path).ok  # late is still wrong


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"ts": "yesterday"}, "time"),
        ({"ts": "2026-11-20T10:00:00+02:00"}, "time"),
        ({"id": "7"}, "id"),
        ({"id": "same"}, "id"),
        ({"type": "note", "body": {"words": 1}}, "body"),
    ],
)
def test_sense_of_single_records(ledger: Ledger, changes: dict[str, Any], rule: str) -> None:
    ledger.append("note", Note(text="x"))
    data = ledger.path.read_bytes()
    if changes.get("id") == "same":
        changes = {"id": json.loads(data.splitlines()[1])["id"]}
    ledger.path.write_bytes(data + forge_after(data, **changes))
    report = verify(ledger.path)
    assert report.first is not None
    assert (report.first.rule, report.first.line, report.first.offset) == (rule, 4, len(data))


def test_checks_are_plugged_in(ledger: Ledger) -> None:
    run_trial(ledger, "t1", 1, decided("reject"))
    seen: list[int] = []

    def check(records: list[Record]) -> list[Problem]:
        seen.append(len(records))
        return [Problem(rule="verdict", reason="differs", line=r.seq + 1) for r in records if r.type == "decided"]

    report = verify(ledger.path, checks=[check])
    assert seen == [report.records] and report.first is not None
    assert report.first.rule == "verdict" and "differs" in str(report.first)
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    assert report.first.offset == sum(len(line) for line in lines[: report.first.line - 1])


def test_damage_comes_first_and_what_lies_before_it_is_still_judged(ledger: Ledger) -> None:
    put(ledger)("preflight.passed", passed())  # a breach before the damage
    run_trial(ledger, "t2", 2, decided("reject"))
    data = ledger.path.read_bytes()
    where = data.index(b'"confirm.ended"')
    ledger.path.write_bytes(data[:where] + b'"confirm.Ended"' + data[where + 15 :])
    report = verify(ledger.path)
    assert [p.rule for p in report.problems] == ["chain", "lifecycle"]
    assert report.problems[0].line == data[:where].count(b"\n") + 1
    assert report.records == report.problems[0].line - 1


def test_a_missing_ledger_is_not_a_good_one(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="No such file"):
        verify(tmp_path / "none.jsonl")


def test_the_commit_of_a_keep_may_follow_its_end(ledger: Ledger) -> None:
    run_trial(ledger, "t1", 1, decided("keep"), sha="1" * 40)
    types = [r.type for r in ledger.records(trial="t1")]
    assert types[-3:] == ["decided", "commit.intent", "commit.done"]
    assert [r.body.parent for r in ledger.records(["commit.intent"]) if isinstance(r.body, CommitIntent)] == [BASE]
    assert errors(ledger) == []
