"""The loop over a made-up world: one verdict and one commit per keep, through kills at every point."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import harness.search as search_module
import harness.transaction as transaction_module
from agent.contract import Proposal
from harness.errors import InfraError, UserError
from harness.executor import RunFailed
from harness.gate.verdict import recompute
from harness.recipe import parse_recipe
from harness.search import SearchOptions, run_search
from harness.state import SearchState, fold
from harness.tracks import get_track
from harness.workspace import Workspace
from ledger.records import BODIES, Decided
from ledger.store import Ledger
from ledger.verify import verify
from tests.conftest import git
from tests.harness.fakes import FakeExecutor, Killed, SilentView

TRACK = "nano"


@pytest.fixture(autouse=True)
def fake_world(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeExecutor.reset()
    monkeypatch.setattr(search_module, "ensure_data", lambda ws, track, note: (Path("/nowhere"), "d" * 64))
    monkeypatch.setattr(search_module, "require_own_code", lambda ws: None)


@pytest.fixture
def ws(checkout: Path) -> Workspace:
    return Workspace(root=checkout, main=checkout)


def go(ws: Workspace, trials: int = 6, **options: Any) -> SearchState:
    """Search and return the state as a fresh reader of the ledger sees it."""
    run_search(ws, SearchOptions(track=TRACK, trials=trials, **options), SilentView(), make_executor=FakeExecutor)
    return read(ws)


def read(ws: Workspace) -> SearchState:
    return fold(Ledger(ws.ledger).records(search=TRACK), TRACK)


def commits(ws: Workspace) -> list[str]:
    """Kept commits on the search branch, oldest first, by their trial trailer."""
    out = git(ws.root, "log", "--reverse", "--format=%(trailers:key=Trial,valueonly,separator=%x2C)", f"search/{TRACK}")
    return [line for line in out.splitlines() if line]


def sound(ws: Workspace, state: SearchState) -> None:
    """Invariants that no kill may break."""
    report = verify(ws.ledger)
    assert report.ok, report
    assert commits(ws) == state.kept
    assert git(ws.root, "status", "--porcelain", "--untracked-files=no") in ("", "M ledger/autoresearch.jsonl")
    assert git(ws.root, "symbolic-ref", "HEAD") == "refs/heads/main"
    seen = Counter((r.trial, r.type, getattr(getattr(r.body, "run", None), "k", len(getattr(r.body, "ks", ()))))
                   for r in Ledger(ws.ledger).records(search=TRACK) if r.trial)
    once = [key for key, n in seen.items() if n > 1 and not key[1].endswith(".started")]
    assert once == []
    for trial in state.trials.values():
        if trial.decided:
            assert recompute(trial.decided) == []
            assert bool(trial.done) == (trial.decided.verdict == "keep")


def test_a_search_keeps_what_helps_and_stops_at_its_budget(ws: Workspace) -> None:
    state = go(ws)
    sound(ws, state)
    assert state.decided == 6
    assert state.kept, "six proposals in this world find something"
    recipe = parse_recipe(git(ws.root, "show", f"search/{TRACK}:trainer/recipes/{TRACK}.toml"), get_track(TRACK))
    last: dict[str, Any] = {}
    for trial in state.standing:
        last.update(trial.proposed.change)
    assert recipe == last
    for trial in state.trials.values():
        if trial.decided and trial.decided.verdict == "keep":
            before = trial.decided.control
            assert all(c.val_bpb > x.val_bpb for c, x in zip(before, trial.decided.candidate, strict=True))


def test_again_prints_instead_of_running(ws: Workspace) -> None:
    go(ws, trials=2)
    n = len(FakeExecutor.calls)
    outcome = run_search(ws, SearchOptions(track=TRACK, trials=2), SilentView(), make_executor=FakeExecutor)
    assert (outcome.reason, len(FakeExecutor.calls)) == ("nothing-to-do", n)
    assert go(ws, trials=3).decided == 3


def test_no_configuration_is_judged_twice_and_seeds_are_fresh(ws: Workspace) -> None:
    state = go(ws, trials=10)
    configs = [t.proposed.config_hash for t in state.trials.values()]
    assert len(configs) == len(set(configs))
    by_generation: dict[int, set[int]] = {}
    for (stage, generation, _, _), runs in state.controls.items():
        if stage == "confirm":
            by_generation[generation] = {r.seed for r in runs.values()}
    breadth = {r.seed for (s, *_), runs in state.controls.items() if s == "breadth" for r in runs.values()}
    seeds = [s for group in by_generation.values() for s in group]
    assert len(seeds) == len(set(seeds)) and not breadth & set(seeds)


def test_both_sides_of_a_pair_share_seeds_and_protocol(ws: Workspace) -> None:
    state = go(ws, trials=4)
    for t in state.trials.values():
        if t.decided:
            assert [r.seed for r in t.decided.control] == [r.seed for r in t.decided.candidate]
            assert {r.split for r in t.decided.candidate} == {"val" if t.decided.stage == "confirm" else "dev"}


POINTS = [f"after:{name}" for name in BODIES if not name.startswith("ledger.")]


@pytest.mark.parametrize("point", ["after:search.started", "after:control.ended", "after:trial.proposed",
                                   "after:preflight.passed", "after:breadth.started", "after:breadth.ended",
                                   "after:confirm.started", "after:confirm.ended", "after:decided", "after:finding",
                                   "after:timing.measured", "after:honest.measured"])
def test_killed_after_any_record_the_search_ends_the_same(
    ws: Workspace, point: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pristine: Path
) -> None:
    whole = summary(go(other(tmp_path, pristine), trials=3))
    assert point in POINTS
    kills = arm(monkeypatch, point)
    for _ in range(200):
        try:
            state = go(ws, trials=3)
            break
        except Killed:
            continue
    else:
        pytest.fail("it never came to its end")
    assert kills["n"] > 0
    sound(ws, state)
    assert summary(state) == whole


def arm(monkeypatch: pytest.MonkeyPatch, point: str) -> dict[str, int]:
    """Kill at ``point`` in every first process that reaches it, then in every third."""
    original = search_module.Bench
    count = {"n": 0, "seen": 0}

    def crash(name: str) -> None:
        if name == point:
            count["seen"] += 1
            if count["seen"] % 3 == 1:
                count["n"] += 1
                raise Killed

    def make(*args: Any, **kwargs: Any) -> Any:
        return original(*args, crash_point=crash, **kwargs)

    monkeypatch.setattr(search_module, "Bench", make)
    return count


def other(tmp_path: Path, pristine: Path) -> Workspace:
    folder = tmp_path / "other"
    git(tmp_path, "clone", "-q", str(pristine), str(folder))
    return Workspace(root=folder, main=folder)


def summary(state: SearchState) -> list[tuple[Any, ...]]:
    """What must not depend on where it was killed."""
    return [(t.id, dict(t.proposed.change), t.verdict, t.reason, t.decided and t.decided.delta_bpb)
            for t in state.trials.values()]


@pytest.mark.parametrize("step", ["build_tree", "build_commit", "pin", "intent", "swap", "bring_along", "done"])
@pytest.mark.parametrize("before", [True, False])
def test_killed_at_any_step_of_the_keep(
    ws: Workspace, step: str, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill before and after every step of the transaction; the restart commits exactly once."""
    wound(monkeypatch, step, before)
    killed = 0
    for _ in range(5):
        try:
            state = go(ws, trials=4)
            break
        except Killed:
            killed += 1
    else:
        pytest.fail("it never came to its end")
    assert killed == 1
    sound(ws, state)


def wound(monkeypatch: pytest.MonkeyPatch, step: str, before: bool) -> None:
    """Make one step of the transaction raise Killed the first time, before or after doing its work."""
    armed = [True]

    def wrap(function: Any, when: Any = lambda *a, **k: True) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            hit = armed[0] and when(*args, **kwargs)
            if hit and before:
                armed[0] = False
                raise Killed
            result = function(*args, **kwargs)
            if hit:
                armed[0] = False
                raise Killed
            return result
        return run

    repo = transaction_module.Repo
    if step in ("build_tree", "build_commit", "bring_along"):
        monkeypatch.setattr(repo, step, wrap(getattr(repo, step)))
    elif step in ("pin", "swap"):
        prefix = "refs/autoresearch/" if step == "pin" else "refs/heads/search/"
        monkeypatch.setattr(repo, "set_ref", wrap(
            repo.set_ref, lambda self, ref, *a, **k: ref.startswith(prefix) and k.get("old") != "0" * 40))
    else:
        name = f"commit.{step}"
        monkeypatch.setattr(Ledger, "append", wrap(Ledger.append, lambda self, type, *a, **k: type == name))


def test_the_checked_out_search_branch_is_brought_along(ws: Workspace) -> None:
    go(ws, trials=1)
    git(ws.root, "checkout", "-q", f"search/{TRACK}")
    state = go(ws, trials=6)
    assert state.kept
    assert git(ws.root, "status", "--porcelain", "--untracked-files=no") in ("", "M ledger/autoresearch.jsonl")
    assert git(ws.root, "rev-parse", "HEAD") == git(ws.root, "rev-parse", f"search/{TRACK}")


@pytest.mark.parametrize("step", ["swap", "bring_along"])
def test_a_kill_between_ref_and_files_is_healed(
    ws: Workspace, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(ws, trials=1)
    git(ws.root, "checkout", "-q", f"search/{TRACK}")
    with monkeypatch.context() as m:
        m.setattr(search_module, "heal_checkout", lambda *args: None)  # it is not what is to be killed
        wound(m, step, step == "bring_along")
        with pytest.raises(Killed):
            go(ws, trials=8)
    assert git(ws.root, "status", "--porcelain", "--untracked-files=no") != ""
    state = go(ws, trials=8)
    assert commits(ws) == state.kept
    assert git(ws.root, "status", "--porcelain", "--untracked-files=no") in ("", "M ledger/autoresearch.jsonl")


def test_a_dirty_tree_is_refused_and_nothing_is_written(ws: Workspace) -> None:
    (ws.root / "Makefile").write_text("mine\n")
    with pytest.raises(UserError, match=r"Makefile.*[Cc]ommit or stash"):
        go(ws)
    assert (ws.root / "Makefile").read_text() == "mine\n"
    assert not ws.ledger.exists()


def test_a_branch_moved_by_somebody_voids_the_keep_and_judges_again(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = transaction_module._prepare
    moved: list[str] = []

    def prepare(repo: Any, ledger: Any, track: Any, search: str, branch: str, trial: Any) -> Any:
        intent = original(repo, ledger, track, search, branch, trial)
        if not moved:
            tree = git(ws.root, "rev-parse", f"{branch}^{{tree}}")
            env = {f"GIT_{who}_{what}": "p@p" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
            new = git(ws.root, "commit-tree", tree, "-p", branch, "-m", "a person's commit", **env)
            git(ws.root, "update-ref", branch, new)
            moved.append(trial.id)
        return intent

    monkeypatch.setattr(transaction_module, "_prepare", prepare)
    state = go(ws, trials=8)
    assert moved
    void = state.trials[moved[0]]
    assert void.void and not void.done
    retries = [t for t in state.trials.values() if t.proposed.retry_of == void.id]
    assert len(retries) == 1 and retries[0].proposed.change == void.proposed.change
    assert verify(ws.ledger).ok
    assert commits(ws) == state.kept


def test_failures_are_named_and_the_search_goes_on(ws: Workspace) -> None:
    bad: list[str] = []

    def fails(request: Any) -> RunFailed | None:
        mine = request.owner.startswith("nano-") and request.stage == "confirm"
        if mine and request.owner not in bad and len(bad) < 2:
            bad.append(request.owner)
            return RunFailed(request=request, kind="nan", detail="loss is not finite at step 3", log_tail="tail")
        return None

    FakeExecutor.fails = staticmethod(fails)
    state = go(ws, trials=5)
    assert [state.trials[t].reason for t in bad] == ["failed.nan"] * 2
    assert state.decided == 5
    sound(ws, state)


def test_the_machines_failures_stop_the_search_and_are_not_held_against_ideas(ws: Workspace) -> None:
    def fails(request: Any) -> RunFailed | None:
        if request.owner.startswith("nano-"):
            return RunFailed(request=request, kind="infra", detail="disk full")
        return None

    FakeExecutor.fails = staticmethod(fails)
    with pytest.raises(InfraError, match="disk full"):
        go(ws)
    state = read(ws)
    assert state.decided == 0
    FakeExecutor.fails = staticmethod(lambda request: None)
    assert go(ws, trials=2).decided == 2


def test_the_incumbents_own_failure_is_an_error_with_its_log(ws: Workspace) -> None:
    FakeExecutor.fails = staticmethod(lambda r: RunFailed(request=r, kind="crash", detail="boom", log_tail="x"))
    with pytest.raises(InfraError, match="boom"):
        go(ws)


def test_a_person_tries_through_the_same_door(ws: Workspace) -> None:
    proposal = Proposal(line="manual", hypothesis="lower is better here", change={"matrix_lr": 0.015}, move="manual")
    run_search(ws, SearchOptions(track=TRACK), SilentView(), proposal, FakeExecutor)
    state = read(ws)
    (trial,) = state.trials.values()
    assert trial.verdict == "keep" and trial.proposed.agent == "person"
    run_search(ws, SearchOptions(track=TRACK), SilentView(), proposal, FakeExecutor)
    assert [t.reason for t in read(ws).trials.values()][1] == "rejected.duplicate"
    locked = Proposal(line="manual", hypothesis="x", change={"train_seq_len": 64})
    run_search(ws, SearchOptions(track=TRACK), SilentView(), locked, FakeExecutor)
    refused = list(read(ws).trials.values())[2]
    assert refused.reason == "refused.invalid" and refused.refused and "fixed by track" in refused.refused.detail


def test_the_users_index_and_work_are_never_touched(ws: Workspace) -> None:
    (ws.root / "notes.txt").write_text("untracked\n")
    before = git(ws.root, "rev-parse", "HEAD"), (ws.root / ".git" / "index").read_bytes()
    state = go(ws)
    assert state.kept
    git(ws.root, "update-index", "-q", "--refresh")
    assert git(ws.root, "rev-parse", "HEAD") == before[0]
    assert (ws.root / "notes.txt").read_text() == "untracked\n"
    assert git(ws.root, "diff", "--cached", "--name-only") == ""


def test_kept_messages_carry_trailers_of_the_verdict(ws: Workspace) -> None:
    state = go(ws)
    ledger = {r.seq: r for r in Ledger(ws.ledger).records()}
    for trial in state.kept:
        sha = state.trials[trial].done.sha  # type: ignore[union-attr]
        seq, h = git(ws.root, "log", "-1", "--format=%(trailers:key=Ledger-Head,valueonly)", sha).split(":")
        record = ledger[int(seq)]
        assert (record.h, record.trial, type(record.body)) == (h, trial, Decided)


def test_a_lost_ledger_file_is_restored(ws: Workspace) -> None:
    state = go(ws, trials=3)
    text = ws.ledger.read_bytes()
    ws.ledger.unlink()
    again = go(ws, trials=3)
    assert ws.ledger.read_bytes() == text
    assert summary(again) == summary(state)


def test_new_trainer_code_on_main_is_caught_up_or_refused(ws: Workspace) -> None:
    state = go(ws, trials=6)
    assert state.kept
    env = {f"GIT_{who}_{what}": "p@p" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    (ws.root / "trainer" / "extra.py").write_text("X = 1\n")
    git(ws.root, "add", "trainer/extra.py")
    git(ws.root, "commit", "-q", "-m", "new trainer code", **env)
    with pytest.raises(UserError, match=rf"git merge search/{TRACK}"):
        go(ws, trials=7)
    git(ws.root, "merge", "-q", "--no-edit", f"search/{TRACK}", **env)
    after = go(ws, trials=7)
    assert after.decided == 7
    contained = ["git", "merge-base", "--is-ancestor", "main", f"search/{TRACK}"]
    assert subprocess.run(contained, cwd=ws.root, check=False).returncode == 0
