"""Trials, lineage and leaders: small histories worked out by hand, and laws over random ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ledger.decode import Record
from ledger.queries import STATUSES, Node, best, lineage, select, tail, trials
from ledger.records import (
    Body,
    CommitDone,
    CommitVoid,
    Finding,
    PreflightRefused,
    StageEnded,
    StageStarted,
    TrialAbandoned,
    TrialFailed,
    TrialProposed,
    Writer,
)
from ledger.store import Ledger
from tests.ledger.samples import (
    BASE,
    EVERY,
    FINGERPRINT,
    control,
    decided,
    figures,
    intent,
    passed,
    proposed,
    run_trial,
    search_started,
)

Event = tuple[str, str, Body]  # trial, type, body
A, B, C = "a" * 40, "c" * 40, "d" * 40


def history(events: Sequence[Event], search: str = "night", start: int = 0) -> list[Record]:
    return [
        Record(
            v=1, seq=start + i, id=f"id-{start + i}", type=type, ts=f"2026-11-20T10:00:{i % 60:02d}.000000Z",
            writer=Writer(host="h", pid=1, boot=""), search=search, trial=trial, body=body, prev="", h="",
        )
        for i, (trial, type, body) in enumerate(events)
    ]


def kept(trial: str, number: int, sha: str, parent: str = BASE, delta: float = -0.01, **changes: object) -> list[Event]:
    proposal = msgspec.structs.replace(proposed(number, parent), **changes)
    return [
        (trial, "trial.proposed", proposal),
        (trial, "preflight.passed", passed()),
        (trial, "decided", decided("keep", 2.25 + delta, 2.25)),
        (trial, "commit.intent", intent(sha, parent)),
        (trial, "commit.done", CommitDone(sha=sha, branch="search/night")),
    ]


def rejected(trial: str, number: int, parent: str = BASE) -> list[Event]:
    return [
        (trial, "trial.proposed", proposed(number, parent)),
        (trial, "preflight.passed", passed()),
        (trial, "decided", decided("reject", 2.26, 2.25)),
    ]


def test_the_status_follows_the_events() -> None:
    events: list[tuple[str, Body, str, str]] = [
        ("trial.proposed", proposed(), "proposed", ""),
        ("preflight.passed", passed(), "running", "preflight"),
        ("breadth.started", StageStarted(k=0, seed=1, run_id="b"), "running", "breadth"),
        ("breadth.ended", StageEnded(run=figures("b")), "running", "breadth"),
        ("confirm.started", StageStarted(k=0, seed=1, run_id="c"), "running", "confirm"),
        ("confirm.ended", StageEnded(run=figures("c")), "running", "confirm"),
        ("decided", decided("keep"), "kept", "confirm"),
        ("commit.intent", intent(), "kept", "confirm"),
        ("commit.done", CommitDone(sha="1" * 40, branch="b"), "kept", "confirm"),
        ("finding", EVERY["finding"], "kept", "confirm"),
    ]
    for count in range(1, len(events) + 1):
        (view,) = trials(history([("t1", type, body) for type, body, _, _ in events[:count]]))
        assert (view.status, view.stage) == events[count - 1][2:]
        assert view.settled == (count >= 7)


def test_the_figures_of_a_verdict() -> None:
    verdict = decided("keep", delta_bpb=-0.015, delta_bytes=-7, delta_step_pct=1.5, cost_seconds=99.0)
    verdict = msgspec.structs.replace(
        verdict,
        candidate=[
            figures("a", val_bpb=2.0, artifact_bytes=100, code_bytes=10),
            figures("b", val_bpb=2.5, artifact_bytes=90, code_bytes=30),
        ],
        control=[figures("c", val_bpb=2.25), figures("d", val_bpb=2.75), figures("e", val_bpb=2.5)],
    )
    events: list[Event] = [
        ("", "search.started", search_started()),
        ("t", "trial.proposed", proposed(7)),
        ("t", "preflight.passed", passed()),
        ("t", "decided", verdict),
    ]
    (view,) = trials(history(events))
    assert (view.number, view.track, view.search) == (7, "pocket", "night")
    assert (view.candidate_bpb, view.control_bpb, view.pairs) == (2.25, 2.5, 2)
    assert (view.delta_bpb, view.delta_bytes, view.delta_step_pct) == (-0.015, -7, 1.5)
    assert view.bytes == 120  # code + weights of the larger candidate
    assert (view.seconds, view.cost_usd, view.tokens) == (99.0, 0.02, 1200)
    assert (view.commit, view.commit_state, view.parent_commit) == ("", "owed", BASE)


@pytest.mark.parametrize(
    ("type", "body", "status", "reason"),
    [
        ("preflight.refused", PreflightRefused(reason="rejected.bytes", detail=""), "refused", "rejected.bytes"),
        ("trial.failed", TrialFailed(reason="failed.oom", stage="breadth", detail=""), "failed", "failed.oom"),
        ("trial.abandoned", TrialAbandoned(reason="stopped"), "abandoned", "stopped"),
        ("decided", decided("reject"), "rejected", "rejected.noise"),
        ("decided", decided("maybe", reason="kept.gain"), "rejected", "kept.gain"),
    ],
)
def test_ends(type: str, body: Body, status: str, reason: str) -> None:
    (view,) = trials(history([("t", "trial.proposed", proposed()), ("t", type, body)]))
    assert (view.status, view.reason) == (status, reason)


def test_a_voided_keep_is_no_keep() -> None:
    events = [*kept("t1", 1, A)[:-1], ("t1", "commit.void", CommitVoid(sha=A, reason="the branch moved"))]
    (view,) = trials(history(events))
    assert (view.status, view.reason, view.commit, view.commit_state) == ("abandoned", "commit.void", "", "void")
    (root,) = lineage(history(events))
    assert root.children == [] and [v.trial for v in root.attempts] == ["t1"]


def test_costs_of_unfinished_work_add_up() -> None:
    events: list[Event] = [
        ("t", "trial.proposed", proposed()),
        ("t", "preflight.passed", passed()),  # 3 s
        ("t", "breadth.ended", StageEnded(run=figures("b", wall_seconds=10.0))),
        ("t", "confirm.ended", StageEnded(run=figures("c", wall_seconds=30.5))),
    ]
    (view,) = trials(history(events))
    assert (view.seconds, view.runs) == (43.5, 2)


def test_filters() -> None:
    other = msgspec.structs.replace(proposed(3), change={"lr": 1.0}, line="schedule")
    events = [*kept("t1", 1, A), *rejected("t2", 2), ("t3", "trial.proposed", other)]
    views = trials(history(events) + history([("t1", "trial.proposed", proposed(9))], "day", 90))
    assert [v.trial for v in select(views, status="kept")] == ["t1"]
    assert [v.number for v in select(views, knob="lr")] == [3]
    assert [v.number for v in select(views, line="schedule")] == [3]
    assert [v.number for v in trials(history(events), search="day")] == []
    assert [v.number for v in views if v.search == "day"] == [9]
    assert [v.trial for v in select(views, since="2026-11-20T10:00:05")] == ["t2", "t3"]


# -- lineage -------------------------------------------------------------------------------------


def shape(node: Node) -> tuple[str, list[str], list[object]]:
    return node.commit[:1], [v.trial for v in node.attempts], [shape(child) for child in node.children]


def test_lineage_by_hand() -> None:
    events: list[Event] = [
        ("", "search.started", search_started()),
        *rejected("t1", 1),
        *kept("t2", 2, A),
        *rejected("t3", 3, A),
        *kept("t4", 4, B, parent=A),
        *kept("t5", 5, C, parent=A),
        *rejected("t6", 6, B),
    ]
    (root,) = lineage(history(events))
    assert shape(root) == ("b", ["t1"], [("a", ["t3"], [("c", ["t6"], []), ("d", [], [])])])
    assert root.trial is None
    assert [node.commit for node in root.walk()] == [BASE, A, B, C]
    made = [node.trial for node in root.walk()]
    assert [view.trial if view else "" for view in made] == ["", "t2", "t4", "t5"]


def test_a_commit_of_a_person_on_top_of_a_keep_goes_beneath_it() -> None:
    merged = "e" * 40
    events: list[Event] = [
        ("", "search.started", search_started()),
        *kept("t1", 1, A, config_hash="config-A"),
        ("", "search.started", search_started(incumbent_commit=merged, incumbent_config="config-A", resumed=True)),
        ("t2", "trial.proposed", msgspec.structs.replace(proposed(2, merged), parent_config="config-A")),
    ]
    (root,) = lineage(history(events))
    assert shape(root) == ("b", [], [("a", [], [("e", ["t2"], [])])])


def test_undoing_a_keep_makes_no_circle() -> None:
    events: list[Event] = [
        *kept("t1", 1, A, parent_config="plain", config_hash="other"),
        *kept("t2", 2, B, parent=A, parent_config="other", config_hash="plain"),
        *rejected("t3", 3, B),
    ]
    (root,) = lineage(history(events))
    assert shape(root) == ("b", [], [("a", [], [("c", ["t3"], [])])])


def test_two_searches_from_one_base_share_its_root_and_can_be_told_apart() -> None:
    records = history([*kept("t1", 1, A)], "night") + history([*rejected("t1", 1)], "day", 50)
    assert [shape(root) for root in lineage(records)] == [("b", ["t1"], [("a", [], [])])]
    assert [shape(root) for root in lineage(records, search="day")] == [("b", ["t1"], [])]


def test_a_line_of_thousands_of_keeps() -> None:
    events: list[Event] = []
    parent = BASE
    for number in range(1, 3001):
        sha = f"{number:040x}"
        events += kept(f"t{number}", number, sha, parent, delta=-0.0001 * number)
        parent = sha
    (root,) = lineage(history(events))
    assert len(list(root.walk())) == 3001
    (leader,) = best(history([("", "search.started", search_started()), *events]))
    assert leader.commit == parent
    assert leader.claimed_gain == pytest.approx(0.0001 * 3000 * 3001 / 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 25))
def test_every_trial_has_exactly_one_place(seed: int, count: int) -> None:
    rng = random.Random(seed)
    commits = [BASE]
    events: list[Event] = []
    for number in range(1, count + 1):
        trial, parent = f"t{number}", rng.choice(commits)
        if rng.random() < 0.4:
            sha = f"{number:040d}"
            events += kept(trial, number, sha, parent)[: rng.choice([3, 4, 5, 5, 5])]
            if events[-1][1] == "commit.done":
                commits.append(sha)
        else:
            events += rejected(trial, number, parent)[: rng.choice([1, 2, 3])]
    records = history(events)
    views, forest = trials(records), lineage(records)
    assert [v.number for v in views] == list(range(1, count + 1))
    assert all(v.status in STATUSES for v in views)
    nodes = [node for root in forest for node in root.walk()]
    placed = [node.trial.trial for node in nodes if node.trial] + [v.trial for node in nodes for v in node.attempts]
    assert sorted(placed) == sorted(v.trial for v in views)
    for node in nodes:
        for child in node.children:
            assert child.trial is not None and child.trial.parent_commit == node.commit
        assert all(v.parent_commit == node.commit and v.status != "kept" for v in node.attempts)


# -- leaders -------------------------------------------------------------------------------------


def test_the_leader_is_the_best_fresh_mean_not_the_best_selected_score() -> None:
    events: list[Event] = [
        ("", "search.started", search_started()),
        *(("", "control.ended", control(BASE, 2.25 + k * 0.01, k)) for k in (0, 1)),
        *kept("t1", 1, A, delta=-0.02),
        ("", "control.ended", control(A, 2.24)),
        ("", "control.ended", control(A, 2.24)),  # the same run, written twice: counted once
        ("", "control.ended", control(A, 9.0, 5, stage="breadth")),  # another stage: not compared
        *kept("t2", 2, B, parent=A, delta=-0.5),  # shines, but only where it was selected
    ]
    (leader,) = best(history(events))
    assert (leader.commit, leader.fresh, leader.runs, leader.val_bpb) == (A, True, 1, 2.24)
    assert leader.claimed_gain == pytest.approx(0.02) and leader.honest_gain == pytest.approx(2.255 - 2.24)
    (selected,) = best(history([events[0], *events[-5:]]))
    assert (selected.commit, selected.fresh, selected.honest_gain) == (B, False, None)


def test_figures_of_different_fingerprints_are_never_compared() -> None:
    other = "0" * 64
    events: list[Event] = [
        ("", "search.started", search_started()),
        ("", "control.ended", control(BASE, 2.25)),
        ("", "search.started", search_started(fingerprint=other, track="gpu-proxy")),
        ("", "control.ended", control(BASE, 1.25, 1, fingerprint=other)),
        *kept("t1", 1, A, fingerprint=other),
        ("", "control.ended", control(A, 1.2, 2, fingerprint=other)),
    ]
    leaders = {leader.fingerprint: leader for leader in best(history(events))}
    assert (leaders[FINGERPRINT].commit, leaders[FINGERPRINT].val_bpb) == (BASE, 2.25)
    assert (leaders[other].commit, leaders[other].val_bpb) == (A, 1.2)
    assert leaders[other].honest_gain == pytest.approx(0.05)
    assert [leader.track for leader in best(history(events), track="pocket")] == ["pocket"]
    assert best(history(events), track="nano") == []


def test_nothing_measured_has_no_leader() -> None:
    assert best([]) == [] and lineage([]) == [] and trials([]) == []
    assert best(history([("", "search.started", search_started())])) == []


def test_tail() -> None:
    records = history([*rejected("t1", 1)])
    assert [r.seq for r in tail(iter(records), 2)] == [1, 2]
    assert list(tail(records, 0)) == [] and len(tail(records, 99)) == 3


def test_a_written_ledger_folds_the_same_way(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    run_trial(ledger, "t1", 1, decided("reject"))
    run_trial(ledger, "t2", 2, decided("keep"), sha=A)
    ledger.append("finding", Finding(line="o", move="m", predicted_bpb=None, measured_bpb=None, lesson="so"),
                  search="night", trial="t2")
    first, second = trials(ledger.records())
    assert (first.status, second.status, second.commit, second.lesson) == ("rejected", "kept", A, "so")
    assert first.proposed_at <= first.ended_at
    assert isinstance(next(iter(ledger.records(["trial.proposed"]))).body, TrialProposed)
