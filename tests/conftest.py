"""Fixtures that several test packages share."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def git(folder: Path, *args: str, **env: str) -> str:
    """Run git as a machine without any identity or configuration would."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return subprocess.run(
        ["git", *args], cwd=folder, check=True, capture_output=True, text=True,
        env={**clean, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", **env},
    ).stdout.strip()


IDENTITY = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@t", "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@t"}


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository made of this checkout's files as they are now, in one commit, with an empty ledger."""
    folder = tmp_path_factory.mktemp("pristine") / "repo"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        source = ROOT / name
        if not source.is_file() or name == "ledger/autoresearch.jsonl" or name.startswith("trainer/recipes/"):
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "pristine", **IDENTITY)
    return folder


@pytest.fixture
def checkout(pristine: Path, tmp_path: Path) -> Path:
    """A fresh clone of :func:`pristine` for one test."""
    folder = tmp_path / "checkout"
    git(tmp_path, "clone", "-q", str(pristine), str(folder))
    return folder
