"""``autoresearch demo``: the real loop in a scratch clone, ``.demo/``, from the plain recipe and an empty ledger.

The clone holds the last commit, without recipes and ledger, and is driven by its own code. An unfinished demo
is resumed; a finished one is cleared away first (its ledger is kept aside), so that it can run again and again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import git

from harness.errors import InfraError, UserError
from harness.gitrepo import IDENTITY, Repo, open_repo
from harness.output import note, say
from harness.search import load_state
from harness.tracks import get_track
from harness.workspace import DATA_ENV, DEMO_DIR, LEDGER_FILE, RECIPES_DIR, STATE_DIR, Workspace
from ledger.durable import atomic_write
from ledger.errors import LedgerError, SearchLocked
from ledger.lock import SearchLock

DEMO_FILE = "demo.json"
ARCHIVE = "demo-ledgers"
LOCK_FILE = "demo.lock"  # held while a clone is prepared
PID_FILE = "demo.pid"
DEFAULT_SEED = 1


def run_demo(ws: Workspace, *, trials: int, seed: int | None, track: str, fresh: bool, plain: bool) -> int:
    """Prepare the clone, then become its search (same process). Raises UserError, InfraError."""
    get_track(track)
    if ws.root.name == DEMO_DIR:
        raise UserError(f"{ws.root} is itself a demo; run `autoresearch demo` in the checkout above it")
    folder = ws.root / DEMO_DIR
    repo = open_repo(ws.root)
    wanted = {"head": repo.rev("HEAD"), "track": track, "seed": DEFAULT_SEED if seed is None else seed}
    lock = SearchLock(ws.state / LOCK_FILE)
    try:
        lock.acquire()
    except SearchLocked:
        raise UserError(f"another demo is being prepared in {folder} ({lock.owner() or 'just now'}); "
                        "wait until it runs, or stop it first") from None
    try:
        _prepare(ws, repo, folder, wanted, trials=trials, fresh=fresh)
        # Who runs here, until its search has taken its own lock: exec keeps the process id and the folder.
        (folder / STATE_DIR / PID_FILE).write_text(str(os.getpid()), encoding="utf-8")
        os.chdir(folder)
    finally:
        lock.release()
    if repo.dirty_paths():
        say("note: your checkout has uncommitted changes; the demo runs the last commit", sys.stderr)
    argv = [sys.executable, "-P", "-m", "harness", "search", "--track", track, "--trials", str(trials),
            "--seed", str(wanted["seed"]), *(["--plain"] if plain else [])]
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", DATA_ENV: str(ws.data)}
    os.execve(sys.executable, argv, env)


def _prepare(ws: Workspace, repo: Repo, folder: Path, wanted: dict[str, Any], *, trials: int, fresh: bool) -> None:
    """Leave in ``folder`` the unfinished demo that was asked for, or a new one; says which and why."""
    if folder.exists():
        _refuse_if_running(folder)
        why = "--fresh" if fresh else _outdated(folder, wanted, trials)
        if not why:
            note(f"resuming the unfinished demo in {folder}")
            return
        kept = _archive(ws, folder)
        note(f"starting the demo over: {why}; " + (f"the old one's ledger is kept in {kept}" if kept else
                                                   "the old one had no ledger yet"))
    _start_over(ws, repo, folder, wanted)


def _outdated(folder: Path, wanted: dict[str, Any], trials: int) -> str:
    """Why the demo that is there cannot be resumed; empty if it can."""
    try:
        known = json.loads((folder / STATE_DIR / DEMO_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if not isinstance(known, dict):
        return f"{folder} does not say what it is of"
    differs = [f"{key} {_short(known.get(key))}, now {_short(value)}"
               for key, value in wanted.items() if known.get(key) != value]
    if differs:
        return "the old one has " + "; ".join(differs).replace("head", "HEAD")
    try:
        state = load_state(Workspace(root=folder, main=folder), str(wanted["track"]))
    except LedgerError:
        return ""  # a torn or damaged ledger is the search's to mend or to report, not ours to delete
    return "" if state.decided < trials or not state.complete else "the last one is finished"


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 40 else text


def _refuse_if_running(folder: Path) -> None:
    """Raises UserError while a search, or a process about to become one, works in ``folder``."""
    owner = SearchLock(folder / STATE_DIR / "search.lock").owner()
    if owner:
        raise UserError(f"a demo is running in {folder} ({owner}); stop it first")
    try:
        pid = int((folder / STATE_DIR / PID_FILE).read_text(encoding="utf-8"))
        starting = pid != os.getpid() and Path(f"/proc/{pid}/cwd").readlink() == folder.resolve()
    except (OSError, ValueError):
        return  # no such file, process or /proc: nobody is known to start here
    if starting:
        raise UserError(f"a demo is running in {folder} (process {pid}, just starting or ending); stop it first")


def _start_over(ws: Workspace, repo: Repo, folder: Path, wanted: dict[str, Any]) -> None:
    """Clear an old demo away and make the clone anew; a kill leaves the old, nothing, or the new, never a half.

    The caller holds the preparation's lock, so every ``.demo.*-*`` is the leftover of a killed one.
    """
    if folder.exists():
        doomed = folder.with_name(f"{DEMO_DIR}.old-{os.getpid()}")
        folder.rename(doomed)
    for left in ws.root.glob(f"{DEMO_DIR}.*-*"):
        shutil.rmtree(left, ignore_errors=True)
    temp = folder.with_name(f"{DEMO_DIR}.new-{os.getpid()}")
    try:
        repo.repo.git.execute(["git", "clone", "--quiet", "--no-tags", "--no-hardlinks", str(ws.root), str(temp)])
        _plain(temp)
    except git.GitCommandError as e:
        shutil.rmtree(temp, ignore_errors=True)
        raise InfraError(f"cannot clone {ws.root} for the demo: {str(e.stderr).strip()}") from e
    state = temp / STATE_DIR
    state.mkdir()
    (state / DEMO_FILE).write_text(json.dumps(wanted), encoding="utf-8")
    temp.rename(folder)
    note(f"scratch workspace {folder}: a clone of {str(wanted['head'])[:12]}, plain recipe, empty ledger")


def _plain(clone: Path) -> None:
    """Commit away the recipes and the ledger of the project itself; the demo's own ledger stays untracked."""
    run = git.Repo(clone).git.execute
    names = run(["git", "ls-files", "--", f"{RECIPES_DIR}/*.toml", LEDGER_FILE]).splitlines()
    if names:
        run(["git", "rm", "--quiet", "--", *names])
        run(["git", "-c", "commit.gpgSign=false", "commit", "--quiet", "-m", "Demo: plain recipe, empty ledger"],
            env={**os.environ, **IDENTITY})
    exclude = clone / ".git" / "info" / "exclude"
    exclude.parent.mkdir(parents=True, exist_ok=True)
    with exclude.open("a", encoding="utf-8") as f:
        f.write(f"/{LEDGER_FILE}\n/{LEDGER_FILE}.*\n")


def _archive(ws: Workspace, folder: Path) -> Path | None:
    """Keep the old demo's ledger: disposable workspace, but no acknowledged record is thrown away."""
    old = folder / LEDGER_FILE
    if not old.is_file() or not old.stat().st_size:
        return None
    folder = ws.state / ARCHIVE
    folder.mkdir(parents=True, exist_ok=True)
    when = time.strftime("%Y%m%dT%H%M%S", time.gmtime(old.stat().st_mtime))
    content = old.read_bytes()
    # The content is part of the name: two ledgers never share one, and a copy cut short is never taken for whole.
    target = folder / f"{when}-{hashlib.sha256(content).hexdigest()[:8]}.jsonl"
    atomic_write(target, content)
    return target
