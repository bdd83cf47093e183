"""The demo's scratch clone: made whole or not at all, resumed when unfinished, started over when done."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import harness.demo as demo_module
from harness.demo import run_demo
from harness.errors import UserError
from harness.search import SearchOptions, run_search
from harness.workspace import Workspace
from ledger.lock import SearchLock
from tests.conftest import IDENTITY, git
from tests.harness.fakes import FakeExecutor, SilentView


class Became(Exception):
    """Stands for exec: what the process would have become."""


@pytest.fixture
def ws(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    (checkout / "trainer" / "recipes").mkdir(parents=True, exist_ok=True)
    (checkout / "trainer" / "recipes" / "nano.toml").write_text("beta2 = 0.9\n")
    (checkout / "ledger" / "autoresearch.jsonl").write_text("")
    git(checkout, "add", "-A", "-f")
    git(checkout, "commit", "-q", "-m", "recipe and ledger", **IDENTITY)

    def execve(path: str, argv: list[str], env: dict[str, str]) -> None:
        raise Became(argv, env, str(Path.cwd()))

    monkeypatch.setattr(demo_module.os, "execve", execve)
    monkeypatch.chdir(checkout)
    return Workspace(root=checkout, main=checkout)


def start(ws: Workspace, **options: Any) -> tuple[list[str], dict[str, str], str]:
    """What the demo becomes."""
    os.chdir(ws.root)
    with pytest.raises(Became) as became:
        run_demo(ws, **{"trials": 2, "seed": None, "track": "nano", "fresh": False, "plain": True, **options})
    return became.value.args  # type: ignore[return-value]


def search_inside(ws: Workspace, monkeypatch: pytest.MonkeyPatch, trials: int) -> None:
    """Let the demo's search run over the made-up world."""
    import harness.search as module

    FakeExecutor.reset()
    monkeypatch.setattr(module, "ensure_data", lambda ws, track, note: (Path("/nowhere"), "d" * 64))
    monkeypatch.setattr(module, "require_own_code", lambda ws: None)
    inner = Workspace(root=ws.root / ".demo", main=ws.root / ".demo")
    run_search(inner, SearchOptions(track="nano", trials=trials, seed=1), SilentView(), make_executor=FakeExecutor)


def test_the_clone_is_plain_and_driven_by_its_own_code(ws: Workspace) -> None:
    argv, env, cwd = start(ws)
    folder = ws.root / ".demo"
    assert cwd == str(folder) == env["PYTHONPATH"]
    assert argv[argv.index("--trials") + 1] == "2" and argv[argv.index("--seed") + 1] == "1"
    assert git(folder, "ls-files", "trainer/recipes", "ledger/autoresearch.jsonl") == ""
    assert git(folder, "status", "--porcelain") == "" == git(ws.root, "status", "--porcelain")
    assert git(folder, "log", "-1", "--format=%an") == "autoresearch"
    assert (ws.root / "trainer/recipes/nano.toml").read_text() == "beta2 = 0.9\n"


def test_unfinished_is_resumed_and_finished_starts_over(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(ws)
    search_inside(ws, monkeypatch, trials=1)
    ledger = (ws.root / ".demo/ledger/autoresearch.jsonl").read_bytes()
    capsys.readouterr()
    start(ws)
    assert "resuming" in capsys.readouterr().out
    assert (ws.root / ".demo/ledger/autoresearch.jsonl").read_bytes() == ledger
    search_inside(ws, monkeypatch, trials=2)
    done = (ws.root / ".demo/ledger/autoresearch.jsonl").read_bytes()
    assert done.startswith(ledger)
    start(ws)
    assert "resuming" not in capsys.readouterr().out
    assert not (ws.root / ".demo/ledger/autoresearch.jsonl").exists()
    (kept,) = (ws.root / ".autoresearch/demo-ledgers").glob("*.jsonl")
    assert kept.read_bytes() == done


@pytest.mark.parametrize("change", [{"seed": 9}, {"fresh": True}, {"track": "pocket"}])
def test_another_demo_starts_over(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    start(ws)
    search_inside(ws, monkeypatch, trials=1)
    capsys.readouterr()
    start(ws, **change)
    said = capsys.readouterr().out
    (kept,) = (ws.root / ".autoresearch/demo-ledgers").iterdir()
    assert "resuming" not in said and str(kept) in said
    assert {"seed": "seed 1, now 9", "fresh": "--fresh", "track": "track nano, now pocket"}[next(iter(change))] in said
    assert not (ws.root / ".demo/ledger/autoresearch.jsonl").exists()


def test_a_new_commit_starts_over(ws: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    start(ws)
    git(ws.root, "commit", "-q", "--allow-empty", "-m", "next", **IDENTITY)
    capsys.readouterr()
    start(ws)
    said = capsys.readouterr().out
    assert "resuming" not in said and f"now {git(ws.root, 'rev-parse', 'HEAD')[:12]}" in said
    assert git(ws.root / ".demo", "rev-parse", "HEAD~1") == git(ws.root, "rev-parse", "HEAD")


def test_leftovers_of_a_killed_preparation_are_cleared(ws: Workspace) -> None:
    for name in (".demo.new-123", ".demo.old-456"):
        (ws.root / name / "x").mkdir(parents=True)
    start(ws)
    assert sorted(p.name for p in ws.root.glob(".demo*")) == [".demo"]


def test_a_running_demo_is_not_torn_away(ws: Workspace) -> None:
    start(ws)
    with SearchLock(ws.root / ".demo/.autoresearch/search.lock"), pytest.raises(UserError, match="is running"):
        run_demo(ws, trials=2, seed=5, track="nano", fresh=True, plain=True)
    assert (ws.root / ".demo" / ".git").is_dir()


def test_a_demo_inside_a_demo_is_refused(ws: Workspace) -> None:
    start(ws)
    inner = Workspace(root=ws.root / ".demo", main=ws.root / ".demo")
    with pytest.raises(UserError, match="itself a demo"):
        run_demo(inner, trials=1, seed=None, track="nano", fresh=False, plain=True)


def test_two_preparations_at_once(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused with the owner's name and leaves the first one's clone in progress alone."""
    plain = demo_module._plain
    refusals: list[str] = []

    def meanwhile(clone: Path) -> None:
        with pytest.raises(UserError) as refused:
            run_demo(ws, trials=2, seed=7, track="nano", fresh=True, plain=True)
        refusals.append(str(refused.value))
        plain(clone)

    monkeypatch.setattr(demo_module, "_plain", meanwhile)
    start(ws)
    assert len(refusals) == 1 and "another demo" in refusals[0] and f"process {os.getpid()}" in refusals[0]
    assert (ws.root / ".demo" / "harness").is_dir()


def test_the_lock_ends_with_the_preparation(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = SearchLock(ws.state / demo_module.LOCK_FILE)
    start(ws)
    assert lock.path.is_file() and lock.owner() is None  # what the process becomes does not hold it
    monkeypatch.setattr(demo_module, "_plain", lambda clone: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_demo(ws, trials=2, seed=7, track="nano", fresh=True, plain=True)
    assert lock.owner() is None


def test_a_demo_that_is_just_starting_is_not_torn_away(ws: Workspace) -> None:
    """Between the preparation's lock and the search's own: known by its process id and folder."""
    start(ws)
    folder = ws.root / ".demo"
    with subprocess.Popen(["sleep", "60"], cwd=folder) as other:
        (folder / ".autoresearch" / demo_module.PID_FILE).write_text(str(other.pid))
        try:
            with pytest.raises(UserError, match=f"is running.*process {other.pid}"):
                run_demo(ws, trials=2, seed=5, track="nano", fresh=True, plain=True)
        finally:
            other.kill()
    start(ws, fresh=True)


@pytest.mark.parametrize("track", ["bogus", "gpu-proxy"])
def test_a_wrong_track_touches_nothing(ws: Workspace, monkeypatch: pytest.MonkeyPatch, track: str) -> None:
    start(ws)
    search_inside(ws, monkeypatch, trials=1)
    ledger = (ws.root / ".demo/ledger/autoresearch.jsonl").read_bytes()
    os.chdir(ws.root)
    with pytest.raises(UserError, match=track):
        run_demo(ws, trials=2, seed=None, track=track, fresh=False, plain=True)
    assert (ws.root / ".demo/ledger/autoresearch.jsonl").read_bytes() == ledger
