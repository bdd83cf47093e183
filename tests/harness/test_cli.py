"""The command line as a user meets it: a clear error for each mistake, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from harness.cli.common import guard
from ledger.errors import LedgerError
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
    (["search", "--seed", str(2**63)], "--seed", str(2**63 - 1)),
    (["demo", "--seed", str(2**63)], "--seed", str(2**63 - 1)),
    (["demo", "--track", "bogus"], "bogus", "pocket"),
    (["train", "--seed", "99999999999999999999"], "99999999999999999999", str(2**63 - 1)),
    (["train", "--track", "record-8x/confirm"], "record-8x", "multi-GPU runs are not built yet"),
    (["search", "--track", "gpu-proxy"], "gpu-proxy", "needs"),
    (["search", "--track", "h100-1x"], "h100-1x", "needs"),
    (["review"], "review", "planned, not in this version"),
    (["sweep", "--help"], "sweep", "README.md"),
    (["promote", "pocket-0001", "--to", "x"], "--to x", "no such track"),
    (["data", "build", "--vocab-size", "5"], "--vocab-size", "from 260 to 65535"),
    (["data", "build", "--tokenizer", "nothere.model"], "--tokenizer", "no such file"),
    (["data", "build", "--val-docs", "-3"], "--val-docs", "from 1 up"),
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
    commands += [["gate", c] for c in ("explain", "show", "simulate", "replay", "calibrate", "panel")]
    commands += [["promote"], ["track", "list"], ["track", "show"]]
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


def test_planned_commands_stay_out_of_help(checkout: Path) -> None:
    from harness.cli.run import PLANNED

    listed = cli(checkout, "--help").stdout
    assert "search" in listed and not [name for name in PLANNED if f" {name} " in listed]


def test_the_vocabulary_sizes_are_the_tokenizers() -> None:
    from harness.cli.data import VOCAB_SIZES
    from trainer.data.tokenizer import MAX_VOCAB, MIN_VOCAB

    assert VOCAB_SIZES == (MIN_VOCAB, MAX_VOCAB)


def redirected(folder: Path, where: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the command line with standard output sent to a shell's ``where``; the exit code is the command's own."""
    line = f"{{ {sys.executable} -P -m harness {' '.join(args)}; echo $? >code; }} {where}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(folder), "NO_COLOR": "1"},
    )
    return subprocess.CompletedProcess(line, int((folder / "code").read_text()), done.stdout, done.stderr)


@pytest.mark.parametrize("args", [["knobs"], ["knobs", "--json"], ["knobs", "beta2", "--json"]])
def test_a_full_disk_is_one_message_and_a_reader_who_left_none(checkout: Path, args: list[str]) -> None:
    full = redirected(checkout, ">/dev/full", *args)
    assert full.returncode == 1 and full.stderr == "autoresearch: No space left on device\n"
    left = redirected(checkout, "| true", *args)
    assert left.returncode == 0 and left.stderr == ""


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, 1), (errno.EIO, 1), (errno.EDQUOT, 1), (errno.EROFS, 1), (errno.EACCES, 2)]
)
def test_a_ledger_error_of_the_machine_is_not_the_users(
    number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        try:
            raise OSError(number, os.strerror(number))
        except OSError as e:
            raise LedgerError("cannot append") from e

    with pytest.raises(typer.Exit) as left:
        guard(command)()
    assert left.value.exit_code == code and capsys.readouterr().err == "autoresearch: cannot append\n"


def test_any_system_error_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    for error, message in [
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (OSError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied"),
        (OSError("odd"), "odd"),
    ]:
        def command(error: OSError = error) -> None:
            raise error

        with pytest.raises(typer.Exit) as left:
            guard(command)()
        assert left.value.exit_code == 1 and capsys.readouterr().err == f"autoresearch: {message}\n"


@pytest.mark.parametrize("where", ["| true", ">/dev/full", "2>&1 | true", ">&-"])
def test_a_search_goes_on_without_a_view(checkout: Path, where: str) -> None:
    """The loop over a made-up world, in its own process, its output going nowhere: every trial is decided."""
    code = (
        "import sys, time; from pathlib import Path; import harness.search as m; time.sleep(0.3)\n"
        "from tests.harness.fakes import FakeExecutor; from harness.workspace import Workspace\n"
        "from harness.views import make_view\n"
        "m.ensure_data = lambda ws, track, note: (Path('/nowhere'), 'd' * 64); m.require_own_code = lambda ws: None\n"
        "here = Path.cwd(); ws = Workspace(root=here, main=here)\n"
        "out = m.run_search(ws, m.SearchOptions(track='nano', trials=2, seed=1), make_view(), "
        "make_executor=FakeExecutor)\n"
        "assert out.state.decided == 2\n"
    )
    (checkout / ".git" / "go.py").write_text(code)
    line = f"{{ {sys.executable} -P .git/go.py; echo $? >.git/code; }} {where}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=checkout, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )
    assert (checkout / ".git" / "code").read_text().strip() == "0", done.stderr
    assert done.stderr == ""
