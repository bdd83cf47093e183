"""Where things are: one declaration of every path of a workspace.

A workspace is a git checkout of this project. Everything that a search makes for itself lives in
``.autoresearch/`` (ignored by git); what it acknowledges lives in ``ledger/autoresearch.jsonl``.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError

CODE_ROOT = Path(__file__).resolve().parent.parent
"""The checkout that this running code was imported from."""

STATE_DIR = ".autoresearch"
LEDGER_FILE = "ledger/autoresearch.jsonl"
RECIPES_DIR = "trainer/recipes"
DEMO_DIR = ".demo"
DATA_ENV = "AUTORESEARCH_DATA"


@dataclass(frozen=True)
class Workspace:
    """Paths of one workspace. ``root``: the checkout commands act on; ``main``: the main checkout,
    which owns the ledger when ``root`` is a linked worktree."""

    root: Path
    main: Path

    @property
    def ledger(self) -> Path:
        """The one ledger of the repository, the same on every branch."""
        return self.main / LEDGER_FILE

    @property
    def state(self) -> Path:
        """Everything disposable or private: runs, slots, blobs, locks, data."""
        return self.main / STATE_DIR

    @property
    def runs(self) -> Path:
        """One folder per run."""
        return self.state / "runs"

    @property
    def slots(self) -> Path:
        """One git worktree per worker."""
        return self.state / "slots"

    @property
    def blobs(self) -> Path:
        """SHA-256-addressed logs and diffs."""
        return self.state / "blobs"

    @property
    def search_lock(self) -> Path:
        """Held by the one loop of this ledger."""
        return self.state / "search.lock"

    @property
    def data(self) -> Path:
        """Data folders; ``$AUTORESEARCH_DATA`` moves them (the demo shares its parent's)."""
        return Path(os.environ.get(DATA_ENV) or self.state / "data")

    @property
    def kb(self) -> Path:
        """The knowledge base."""
        return self.root / "kb"

    def recipe(self, track: str) -> Path:
        """The incumbent's knobs on a track: only what differs from the track."""
        return self.root / recipe_path(track)


def recipe_path(track: str) -> str:
    """Repository path of a track's recipe."""
    return f"{RECIPES_DIR}/{track}.toml"


def find_workspace(given: str | None = None) -> Workspace:
    """The workspace at ``given`` (default: around the current folder). Raises UserError outside one."""
    start = Path(given).expanduser() if given else Path.cwd()
    if not start.is_dir():
        raise UserError(f"--workspace {given}: no such folder; give a git checkout of autoresearch")
    try:
        out = subprocess.run(
            ["git", "rev-parse", "--path-format=absolute", "--show-toplevel", "--git-common-dir"],
            cwd=start, capture_output=True, text=True, check=True,
        ).stdout.splitlines()
    except FileNotFoundError:
        raise UserError("git is not installed: install it (for example `apt-get install git`)") from None
    except subprocess.CalledProcessError as e:
        why = e.stderr.strip().splitlines()[-1] if e.stderr.strip() else "not a git checkout"
        raise UserError(f"{start}: {why}. autoresearch works on a git clone of its own repository: "
                        "cd into one, or give --workspace DIR") from None
    root, common = Path(out[0]), Path(out[1])
    if not (root / "trainer" / "contract.py").is_file() or not (root / "harness" / "tracks.toml").is_file():
        raise UserError(f"{root}: a git checkout, but not of autoresearch (no trainer/contract.py); "
                        "cd into a clone of it, or give --workspace DIR")
    main = common.parent if common.name == ".git" and (common.parent / "trainer").is_dir() else root
    return Workspace(root=root, main=main)


def require_own_code(ws: Workspace) -> None:
    """Refuse to drive a workspace with another checkout's code: the trainer and the referee must be its own."""
    if CODE_ROOT.resolve() == ws.root.resolve():
        return
    raise UserError(
        f"this command runs the code of {CODE_ROOT}, but the workspace is {ws.root}. A search must be run by the "
        f"workspace's own code: use `PYTHONPATH={ws.root} python -P -m harness ...`, or run `make setup` in {ws.root} "
        f"and use its .venv/bin/autoresearch"
    )
