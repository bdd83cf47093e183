"""The command line as a user meets it: a clear error for each mistake, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import git


def cli(folder: Path, *args: str, code: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the checkout's own command line in it."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "harness", *args], cwd=folder, capture_output=True, text=True, timeout=120,
        check=False, env={**os.environ, "PYTHONPATH": str(code or folder), "COLUMNS": "120", "NO_COLOR": "1", **env},
    )


MISTAKES = [
    (["search", "--track", "pokcet"], r"pokcet", "pocket"),
    (["search", "--trials", "0"], "--trials", "1"),
    (["search", "--trials", "many"], "--trials", "many"),
    (["search", "--until", "25:00"], "25:00", "07:00"),
    (["search", "--hours", "-1"], "--hours", "above 0"),
    (["search", "--agent", "gpt"], "gpt", "garden"),
    (["search", "--seed", "-1"], "--seed", "-1"),
    (["search", "--nonsense"], "--nonsense", ""),
    (["search", "--name", "../x"], "../x", "pocket-2"),
    (["search", "--name", "a b"], "a b", "pocket-2"),
    (["search", "--name", "-x"], "-x", "pocket-2"),
    (["search", "--name", "x.lock"], "x.lock", "pocket-2"),
    (["try", "--set", "bta2=0.9", "--why", "x"], "bta2", "beta2"),
    (["try", "--set", "beta2=2", "--why", "x"], "beta2", "0 to"),
    (["try", "--set", "beta2", "--why", "x"], "beta2", "NAME=VALUE"),
    (["try", "--set", "beta2=0.9"], "--why", "sentence"),
    (["try", "--set", "beta2=0.95", "--why", "x"], "beta2", "already"),
    (["try", "--set", "iterations=9", "--why", "x"], "iterations", "fixed by the track"),
    (["try", "--why", "x"], "--set", "knobs"),
    (["try", "--patch", "a.diff", "--why", "x"], "a.diff", "sandbox"),
    (["train", "--track", "pocket/brad"], "brad", "pocket/breadth"),
    (["train", "--set", "num_heads=3"], "num_heads", "divide"),
    (["knobs", "matrix_rl"], "matrix_rl", "matrix_lr"),
    (["data", "build", "--from", "nothere.jsonl", "--out", "x"], "nothere.jsonl", "jsonl.zst"),
    (["data", "build", "--from", "README.md"], "--out", "folder"),
    (["data", "check", "nothere"], "nothere", "no such folder"),
    (["ledger", "show", "pocket-0001"], "no ledger yet", "search"),
    (["ledger", "verify"], "no ledger yet", "search"),
    (["gate", "explain", "pocket-0001"], "pocket-0001", ""),
    (["-w", "/nowhere", "knobs"], "-w", ""),
]


@pytest.mark.parametrize(("args", "names", "helps"), MISTAKES, ids=lambda a: " ".join(a) if isinstance(a, list) else "")
def test_a_mistake_is_named_and_nothing_is_written(checkout: Path, args: list[str], names: str, helps: str) -> None:
    done = cli(checkout, *args)
    shown = done.stderr + done.stdout
    assert done.returncode == 2, shown
    assert names in shown and helps in shown
    assert "Traceback" not in shown
    assert git(checkout, "status", "--porcelain", "--ignored") == ""
    assert git(checkout, "branch", "--list", "search/*") == ""


def test_outside_a_clone(tmp_path: Path, checkout: Path) -> None:
    done = cli(tmp_path, "search", code=checkout)
    assert done.returncode == 2 and "git clone" in done.stderr and "Traceback" not in done.stderr
    git(tmp_path, "init", "-q")
    done = cli(tmp_path, "search", code=checkout)
    assert done.returncode == 2 and "not of autoresearch" in done.stderr


def test_another_clones_code_is_refused(checkout: Path, pristine: Path) -> None:
    done = cli(checkout, "search", "--trials", "1", code=pristine)
    assert done.returncode == 2 and str(pristine) in done.stderr and str(checkout) in done.stderr


def test_a_repository_without_a_commit(checkout: Path) -> None:
    git(checkout, "update-ref", "-d", "HEAD")
    done = cli(checkout, "search", "--trials", "1")
    assert done.returncode == 2 and "no commit yet" in done.stderr


def test_every_command_has_help_with_an_example(checkout: Path) -> None:
    commands = [[c] for c in ("search", "try", "train", "demo", "knobs")]
    commands += [["data", c] for c in ("build", "check")]
    commands += [["ledger", c] for c in ("show", "tail", "verify", "lineage", "best", "publish")]
    commands += [["gate", "explain"]]
    for command in commands:
        done = cli(checkout, *command, "--help")
        assert done.returncode == 0 and "Example: autoresearch" in done.stdout, command


def test_knobs_as_json(checkout: Path) -> None:
    rows = json.loads(cli(checkout, "knobs", "--json").stdout)
    from trainer.knobs import REGISTRY

    assert {r["name"]: r["default"] for r in rows} == REGISTRY.defaults()
    (one,) = json.loads(cli(checkout, "knobs", "MATRIX_LR", "--json").stdout)
    assert one["name"] == "matrix_lr"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere: read-only modes do not bind it")
def test_a_read_only_checkout(checkout: Path) -> None:
    for folder in (checkout, checkout / ".git", checkout / "ledger"):
        folder.chmod(0o555)
    try:
        done = cli(checkout, "search", "--trials", "1")
    finally:
        for folder in (checkout, checkout / ".git", checkout / "ledger"):
            folder.chmod(0o755)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
