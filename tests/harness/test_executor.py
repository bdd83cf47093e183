"""The local executor over real processes: each way a run can go wrong is caused, told apart, and blamed rightly."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import harness.executor as executor_module
from harness.executor import LocalExecutor, RunDone, RunFailed, RunRequest
from harness.gitrepo import Repo
from harness.tracks import get_track
from tests.conftest import IDENTITY, git

PLAYER = '''
import hashlib, json, os, signal, sys, time
from pathlib import Path
from trainer.contract import *
from trainer.tree import evaluator_hash, tree_hash

mode, path = sys.argv[1], Path(sys.argv[2])
folder = path.parent
count = folder.parent / f"{mode}-count"
count.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))
nth = int(count.read_text())

def result(**other):
    spec = load(RunSpec, path)
    (folder / ARTIFACT_FILE).write_bytes(b"weights")
    base = dict(run_id=spec.run_id, seed=spec.seed, steps=3, tokens=9, params=7, train_seconds=1.0, setup_seconds=0.1,
                export_seconds=0.1, step_ms=1.0, final_train_loss=4.0, artifact_path=str(folder / ARTIFACT_FILE),
                artifact_bytes=7, artifact_sha256=hashlib.sha256(b"weights").hexdigest(), code_bytes=5,
                peak_memory_bytes=1, tree_hash=tree_hash(), torch_version="0", device_name="cpu")
    dump(RunResult(**{**base, **other}), folder / RESULT_FILE)

def score(**other):
    spec = load(ScoreSpec, path)
    base = dict(run_id=spec.run_id, split=spec.split, val_loss=4.0, val_bpb=2.5, tokens=10, bytes=20, eval_seconds=0.1,
                artifact_sha256=spec.artifact_sha256, evaluator_hash=evaluator_hash(), data_fingerprint="d")
    dump(ScoreResult(**{**base, **other}), folder / SCORE_FILE)

def failure(kind, error):
    spec = json.loads(path.read_text())
    target = folder / (RESULT_FILE if mode == "train" else SCORE_FILE)
    dump(Failure(run_id=spec["run_id"], failure=kind, error=error), target)
    sys.exit(3)

def train():
    TRAIN

def referee():
    SCORE

train() if mode == "train" else referee()
'''


@pytest.fixture
def build(checkout: Path, tmp_path: Path) -> Iterator[Any]:
    """make(train=..., score=...) -> a run's outcome under a trainer whose two halves do just that."""
    made: list[LocalExecutor] = []

    def make(train: str = "result()", score: str = "score()", runs: int = 1, **limits: Any) -> Any:
        text = PLAYER.replace("    TRAIN", textwrap.indent(train, "    "))
        text = text.replace("    SCORE", textwrap.indent(score, "    "))
        (checkout / "trainer" / "__main__.py").write_text(text)
        git(checkout, "add", "-A")
        git(checkout, "commit", "-q", "-m", "player", **IDENTITY)
        track = executor_module.dataclasses.replace(get_track("nano"), workers=1, **limits)
        head = git(checkout, "rev-parse", "HEAD")
        executor = LocalExecutor(repo=Repo(checkout), track=track, data_dir=tmp_path, runs=tmp_path / "runs",
                                 slots=tmp_path / "slots", pinned=head)
        made.append(executor)
        request = RunRequest(run_id="r1", owner="t", stage="confirm", k=0, seed=5, knobs=track.resolve({}), commit=head)
        outcomes = [executor.submit(request, lambda r, e: None).result() for _ in range(runs)]
        return outcomes if runs > 1 else outcomes[0]

    yield make
    for executor in made:
        executor.close()


def counted(tmp_path: Path, mode: str) -> int:
    return int((tmp_path / "runs" / f"{mode}-count").read_text())


def test_a_good_run_joins_both_sides_figures(build: Any, tmp_path: Path) -> None:
    done = build()
    assert isinstance(done, RunDone)
    run = done.figures
    assert (run.val_bpb, run.artifact_bytes, run.seed, run.attempt) == (2.5, 7, 5, 1)


FAULTS = [
    ("failure('nan', 'step 3')", "score()", "nan", 1, 0),
    ("failure('oom', 'no memory')", "score()", "oom", 1, 0),
    ("failure('export', 'cannot')", "score()", "export", 1, 0),
    ("os.kill(os.getpid(), signal.SIGSEGV)", "score()", "crash", 1, 0),
    ("raise RuntimeError('boom')", "score()", "crash", 1, 0),
    ("pass", "score()", "crash", 1, 0),
    ("os.kill(os.getpid(), signal.SIGKILL)", "score()", "infra", 3, 0),
    ("time.sleep(60)", "score()", "timeout", 1, 0),
    ("(folder / RESULT_FILE).write_text('{torn')", "score()", "crash", 1, 0),
    ("result(artifact_bytes=6)", "score()", "export", 1, 0),
    ("result(seed=6)", "score()", "crash", 1, 0),
    ("result(run_id='another')", "score()", "crash", 1, 0),
    ("result(tree_hash='0' * 64)", "score()", "infra", 3, 0),
    ("result()", "failure('export', 'unreadable artifact')", "export", 1, 1),
    ("result()", "failure('nan', 'logits')", "nan", 1, 1),
    ("result()", "os.kill(os.getpid(), signal.SIGKILL)", "infra", 1, 3),
    ("result()", "score(evaluator_hash='0' * 64)", "infra", 1, 3),
]


@pytest.mark.parametrize(("train", "score", "kind", "trained", "scored"), FAULTS, ids=lambda v: str(v)[:40])
def test_a_fault_is_named_and_only_the_machines_are_retried(
    build: Any, tmp_path: Path, train: str, score: str, kind: str, trained: int, scored: int
) -> None:
    limits = {"run_timeout_s": 1.5} if "sleep" in train else {}
    outcome = build(train, score, **limits)
    assert isinstance(outcome, RunFailed)
    assert outcome.kind == kind, outcome
    assert outcome.detail
    assert counted(tmp_path, "train") == trained
    if scored:
        assert counted(tmp_path, "score") == scored


def test_a_run_that_trained_but_was_not_scored_is_not_trained_again(build: Any, tmp_path: Path) -> None:
    first, second = build(score="failure('crash', 'once') if nth == 1 else score()", runs=2)
    assert isinstance(first, RunFailed) and isinstance(second, RunDone)
    assert (counted(tmp_path, "train"), counted(tmp_path, "score")) == (1, 2)


def test_the_machines_fault_once_is_survived(build: Any, tmp_path: Path) -> None:
    done = build(train="os.kill(os.getpid(), signal.SIGKILL) if nth == 1 else result()")
    assert isinstance(done, RunDone) and done.figures.attempt == 2


def test_a_run_imports_its_own_worktree_and_the_referee_the_pinned_one(build: Any, tmp_path: Path) -> None:
    note = "(folder / f'{mode}-from').write_text(str(Path(tree_hash.__code__.co_filename).parent.parent))"
    assert isinstance(build(train=f"{note}; result()", score=f"{note}; score()"), RunDone)
    run = tmp_path / "runs" / "r1"
    assert (run / "train-from").read_text() == str(tmp_path / "slots" / "0")
    assert (run / "score-from").read_text() == str(tmp_path / "slots" / "referee")


def test_a_worktree_in_any_state_is_made_clean(checkout: Path, tmp_path: Path) -> None:
    repo, folder = Repo(checkout), tmp_path / "slot"
    head = git(checkout, "rev-parse", "HEAD")
    repo.worktree(folder, head)
    (folder / "trainer" / "contract.py").write_text("broken")
    (folder / "stray.py").write_text("x")
    repo.worktree(folder, head)
    assert git(folder, "status", "--porcelain", "--ignored") == ""
    (folder / ".git").write_text("gitdir: /nowhere\n")
    repo.worktree(folder, head)
    assert git(folder, "rev-parse", "HEAD") == head
    shutil.rmtree(folder)
    repo.worktree(folder, head)
    assert git(folder, "rev-parse", "HEAD") == head
