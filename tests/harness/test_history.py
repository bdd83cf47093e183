"""Branch, pins, locks and ledger at start: what people and kills do to them is mended or refused, never ignored."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import harness.search as search_module
from harness.audit import commits as commit_check
from harness.audit import verdicts
from harness.data import ensure_data
from harness.errors import UserError
from harness.gitrepo import Repo
from harness.runner import kill_orphans
from harness.search import SearchOptions, run_search
from harness.tracks import get_track
from harness.workspace import Workspace
from ledger.errors import LedgerError
from ledger.verify import verify
from tests.conftest import IDENTITY, git
from tests.harness.fakes import FakeExecutor, SilentView
from tests.harness.test_loop import TRACK, commits, fake_world, go, read, sound, ws

__all__ = ["fake_world", "ws"]  # fixtures


def kept(ws: Workspace) -> Any:
    """A search with at least one keep."""
    state = go(ws, trials=6)
    assert state.kept
    return state


def test_locks_of_a_killed_git_are_removed(ws: Workspace) -> None:
    kept(ws)
    git(ws.root, "checkout", "-q", f"search/{TRACK}")
    locks = [ws.root / ".git" / p for p in ("refs/autoresearch/ledger.lock", f"refs/heads/search/{TRACK}.lock",
                                            "index.lock")]
    for lock in locks:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    state = go(ws, trials=12)
    assert state.decided == 12 and not any(lock.exists() for lock in locks)
    assert commits(ws) == state.kept


def test_a_living_gits_lock_is_left_alone(ws: Workspace) -> None:
    kept(ws)
    lock = ws.root / ".git/refs/autoresearch/ledger.lock"
    lock.touch()
    alive = subprocess.Popen(["git", "cat-file", "--batch"], cwd=ws.root, stdin=subprocess.PIPE,
                             stdout=subprocess.DEVNULL)
    try:
        assert Repo(ws.root).clear_stale_locks(f"refs/heads/search/{TRACK}") == []
        assert lock.exists()
    finally:
        alive.communicate()
    assert Repo(ws.root).clear_stale_locks(f"refs/heads/search/{TRACK}") == ["refs/autoresearch/ledger.lock"]


def test_a_copy_in_git_that_cannot_be_made_does_not_end_the_search(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(root: Path, ledger: Path) -> str:
        raise LedgerError("cannot lock ref")

    monkeypatch.setattr(search_module, "publish_ref", broken)
    assert go(ws, trials=3).decided == 3


def test_the_deciding_record_is_in_git_before_its_commit(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    original, seen = search_module.commit_keep, []

    def commit(repo: Any, ledger: Any, track: Any, search: str, branch: str, trial: Any) -> Any:
        stored = git(ws.root, "show", "refs/autoresearch/ledger:autoresearch.jsonl")
        seen.append(trial.decided_ref[1] in stored)
        return original(repo, ledger, track, search, branch, trial)

    monkeypatch.setattr(search_module, "commit_keep", commit)
    kept(ws)
    assert seen and all(seen)


def test_a_branch_with_a_commit_that_the_ledger_does_not_know_is_refused(ws: Workspace) -> None:
    kept(ws)
    git(ws.root, "update-ref", "-d", "refs/autoresearch/ledger")
    ws.ledger.unlink()
    with pytest.raises(UserError, match=r"no such record: it was cut or replaced"):
        go(ws)


def test_keeps_that_came_with_a_clone_are_not_asked_for(ws: Workspace) -> None:
    """The demo's case: the base carries kept commits, the new ledger is empty."""
    kept(ws)
    git(ws.root, "merge", "-q", "--ff-only", f"search/{TRACK}")
    git(ws.root, "branch", "-D", f"search/{TRACK}")
    for ref in git(ws.root, "for-each-ref", "--format=%(refname)", "refs/autoresearch").splitlines():
        git(ws.root, "update-ref", "-d", ref)
    ws.ledger.unlink()
    assert go(ws, trials=2).decided == 2
    assert verify(ws.ledger, [verdicts, commit_check(Repo(ws.root))]).ok


def test_a_lost_trials_pin_is_never_moved(ws: Workspace) -> None:
    state = kept(ws)
    trial = state.kept[0]
    pin = git(ws.root, "rev-parse", f"refs/autoresearch/trial/{trial}")
    git(ws.root, "update-ref", "-d", "refs/autoresearch/ledger")
    git(ws.root, "branch", "-D", f"search/{TRACK}")
    ws.ledger.unlink()
    FakeExecutor.world = staticmethod(lambda r: 2.0 - 0.1 * float(r.knobs["beta2"]) - 1e-9 * (r.seed % 97))
    for _ in range(3):
        try:
            go(ws, trials=12, seed=77)
        except UserError as e:
            assert "lost the trial" in str(e)
    assert git(ws.root, "rev-parse", f"refs/autoresearch/trial/{trial}") == pin


def test_a_branch_moved_back_is_refused_and_the_advice_works(ws: Workspace) -> None:
    kept(ws)
    git(ws.root, "branch", "-f", f"search/{TRACK}", "main")
    with pytest.raises(UserError, match="moved back") as refused:
        go(ws, trials=9)
    advice = str(refused.value).split("`")[1].split()
    git(ws.root, *advice[1:])
    sound(ws, go(ws, trials=9))


def test_a_deleted_branch_is_refused_and_the_advice_works(ws: Workspace) -> None:
    kept(ws)
    git(ws.root, "branch", "-D", f"search/{TRACK}")
    with pytest.raises(UserError, match="is gone") as refused:
        go(ws, trials=9)
    git(ws.root, *str(refused.value).split("`")[1].split()[1:])
    sound(ws, go(ws, trials=9))


def test_a_branch_deleted_while_it_runs_is_an_error_in_words(ws: Workspace) -> None:
    def world(request: Any) -> float:
        if request.owner == f"{TRACK}-0002":
            subprocess.run(["git", "update-ref", "-d", f"refs/heads/search/{TRACK}"], cwd=ws.root, check=True)
        return 2.5 + 1e-4 * (request.seed % 7)

    FakeExecutor.world = staticmethod(world)
    with pytest.raises(UserError, match="was deleted while the search ran"):
        go(ws)


def test_the_branch_checked_out_in_another_worktree_is_refused(ws: Workspace, tmp_path: Path) -> None:
    kept(ws)
    other = tmp_path / "other"
    git(ws.root, "worktree", "add", "-q", str(other), f"search/{TRACK}")
    with pytest.raises(UserError, match="checked out in the worktree"):
        go(ws, trials=9)
    git(other, "switch", "-q", "--detach")
    sound(ws, go(ws, trials=9))


def test_a_copied_checkout_makes_slots_of_its_own(checkout: Path, tmp_path: Path) -> None:
    slot = checkout / ".autoresearch" / "slots" / "0"
    head = git(checkout, "rev-parse", "HEAD")
    Repo(checkout).worktree(slot, head)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(checkout), str(copy)], check=True)
    before = (checkout / ".git/worktrees/0/logs/HEAD").read_text()
    git(copy, "commit", "-q", "--allow-empty", "-m", "next", **IDENTITY)
    new = git(copy, "rev-parse", "HEAD")
    Repo(copy).worktree(copy / ".autoresearch" / "slots" / "0", new)
    assert (checkout / ".git/worktrees/0/logs/HEAD").read_text() == before
    assert git(copy / ".autoresearch/slots/0", "rev-parse", "HEAD") == new


def test_an_orphan_without_a_pid_file_is_found_by_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r1"
    run.mkdir(parents=True)
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=run, start_new_session=True)
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=tmp_path,
                                start_new_session=True)
    try:
        time.sleep(0.2)
        assert kill_orphans(tmp_path / "runs") == ["r1"]
        assert orphan.wait(5) == -9 and stranger.poll() is None
    finally:
        for p in (orphan, stranger):
            if p.poll() is None:
                os.killpg(p.pid, 9)
            p.wait()


def test_a_damaged_shard_is_noticed_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte of a train shard: the embedded cache is rebuilt, with a notice, to the very same fingerprint."""
    monkeypatch.setenv("AUTORESEARCH_DATA", str(tmp_path / "data"))
    here = Workspace(root=tmp_path, main=tmp_path)
    folder, before = ensure_data(here, get_track("nano"), lambda text: None)
    (shard,) = folder.glob("*_train_*.bin")
    data = bytearray(shard.read_bytes())
    data[9000] ^= 1
    shard.write_bytes(data)
    notes: list[str] = []
    assert ensure_data(here, get_track("nano"), notes.append)[1] == before
    assert any("sha256" in n and "built anew" in n for n in notes)


def test_a_single_trial_is_judged_and_the_search_goes_on_from_it(ws: Workspace) -> None:
    kept(ws)
    outcome = run_search(ws, SearchOptions(track=TRACK, trials=7), SilentView(), make_executor=FakeExecutor)
    assert outcome.reason == "budget.trials" and read(ws).complete
