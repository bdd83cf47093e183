"""``autoresearch demo``: the real loop in a scratch clone, ``.demo/``, from the plain recipe and an empty ledger.

The clone holds the last commit, without recipes and ledger, and is driven by its own code. An unfinished demo
is resumed; a finished one is cleared away first (its ledger is kept aside), so that it can run again and again.
"""

from __future__ import annotations

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
from harness.search import load_state
from harness.workspace import DATA_ENV, DEMO_DIR, LEDGER_FILE, RECIPES_DIR, STATE_DIR, Workspace
from ledger.errors import LedgerError
from ledger.lock import SearchLock

DEMO_FILE = "demo.json"
ARCHIVE = "demo-ledgers"
DEFAULT_SEED = 1


def run_demo(ws: Workspace, *, trials: int, seed: int | None, track: str, fresh: bool, plain: bool) -> int:
    """Prepare the clone, then become its search (same process). Raises UserError, InfraError."""
    if ws.root.name == DEMO_DIR:
        raise UserError(f"{ws.root} is itself a demo; run `autoresearch demo` in the checkout above it")
    folder = ws.root / DEMO_DIR
    repo = open_repo(ws.root)
    head = repo.rev("HEAD")
    wanted = {"head": head, "track": track, "seed": DEFAULT_SEED if seed is None else seed}
    if folder.exists() and not fresh and _unfinished(folder, wanted, trials):
        print(f"resuming the unfinished demo in {folder}")
    else:
        _start_over(ws, repo, folder, wanted)
    if repo.dirty_paths():
        print("note: your checkout has uncommitted changes; the demo runs the last commit", file=sys.stderr)
    argv = [sys.executable, "-P", "-m", "harness", "search", "--track", track, "--trials", str(trials),
            "--seed", str(wanted["seed"]), *(["--plain"] if plain else [])]
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", DATA_ENV: str(ws.data)}
    os.chdir(folder)
    sys.stdout.flush()
    os.execve(sys.executable, argv, env)


def _unfinished(folder: Path, wanted: dict[str, Any], trials: int) -> bool:
    try:
        known = json.loads((folder / STATE_DIR / DEMO_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if known != wanted:
        return False
    try:
        state = load_state(Workspace(root=folder, main=folder), str(wanted["track"]))
    except LedgerError:
        return True  # a torn or damaged ledger is the search's to mend or to report, not ours to delete
    return state.decided < trials or not state.complete


def _start_over(ws: Workspace, repo: Repo, folder: Path, wanted: dict[str, Any]) -> None:
    """Clear an old demo away and make the clone anew; a kill leaves the old, nothing, or the new, never a half."""
    if folder.exists():
        owner = SearchLock(folder / STATE_DIR / "search.lock").owner()
        if owner:
            raise UserError(f"a demo is running in {folder} ({owner}); stop it first")
        _archive(ws, folder)
        doomed = folder.with_name(f"{DEMO_DIR}.old-{os.getpid()}")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
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
    print(f"scratch workspace {folder}: a clone of {str(wanted['head'])[:12]}, plain recipe, empty ledger")


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


def _archive(ws: Workspace, folder: Path) -> None:
    """Keep the finished demo's ledger: disposable workspace, but no acknowledged record is thrown away."""
    old = folder / LEDGER_FILE
    if old.is_file() and old.stat().st_size:
        target = ws.state / ARCHIVE
        target.mkdir(parents=True, exist_ok=True)
        name = time.strftime("%Y%m%dT%H%M%S", time.gmtime(old.stat().st_mtime))
        shutil.copyfile(old, target / f"{name}.jsonl")
