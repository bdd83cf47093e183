"""The real thing on the nano track: fresh clone, real processes, real commits; the score recomputed independently."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from harness.audit import commits as commit_check
from harness.audit import verdicts
from harness.gitrepo import Repo
from harness.state import fold
from ledger.records import ControlEnded, StageEnded
from ledger.store import Ledger
from ledger.verify import verify
from tests.conftest import ROOT, git
from tests.harness.test_cli import cli

DATA = ROOT / ".autoresearch" / "data"  # shared with the checkout, so that the corpus is built once


def demo(clone: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "harness", "demo", "--track", "nano", "--plain", *args], cwd=clone,
        capture_output=True, text=True, timeout=400, check=False, env=environment(clone),
    )


def environment(clone: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(clone), "AUTORESEARCH_DATA": str(DATA), "NO_COLOR": "1"}


def assert_sound(folder: Path, outer: Path) -> None:
    """Ledger, verdicts, commits and both git trees are as they should be."""
    report = verify(folder / "ledger" / "autoresearch.jsonl", [verdicts, commit_check(Repo(folder))])
    assert report.ok and not report.problems, report.problems
    state = fold(Ledger(folder / "ledger" / "autoresearch.jsonl").records(search="nano"), "nano")
    trailers = git(folder, "log", "--reverse", "--format=%(trailers:key=Trial,valueonly,separator=%x2C)", "search/nano")
    assert [t for t in trailers.splitlines() if t] == state.kept
    assert git(folder, "status", "--porcelain") == ""
    assert git(outer, "status", "--porcelain") == ""
    assert not (outer / "ledger" / "autoresearch.jsonl").exists()
    assert git(outer, "for-each-ref", "--format=%(refname)") in (
        "refs/heads/main\nrefs/remotes/origin/HEAD\nrefs/remotes/origin/main", "refs/heads/main")


@pytest.fixture(scope="module")
def finished(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A demo of one nano trial in a fresh clone; (clone, what it printed)."""
    clone = tmp_path_factory.mktemp("real") / "clone"
    git(clone.parent, "clone", "-q", str(pristine), str(clone))
    done = demo(clone, "--trials", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    return clone, done.stdout


def test_the_demo_runs_to_its_end_and_touches_only_its_own_folder(finished: tuple[Path, str]) -> None:
    clone, out = finished
    assert_sound(clone / ".demo", clone)
    assert "1 decided" in out and "where to look next" in out and "verdicts mean nothing" in out


def test_every_ledger_command_shows_a_real_ledger(finished: tuple[Path, str]) -> None:
    """show, tail, lineage, best, verify and explain all work on a real ledger, as text and as JSON."""
    clone, _ = finished
    for command in (["show"], ["show", "nano-0001"], ["tail", "-n", "5"], ["lineage"], ["best"], ["verify"]):
        plain = cli(clone, "ledger", *command, "-w", ".demo")
        assert plain.returncode == 0 and plain.stdout.strip(), (command, plain.stderr)
        as_json = cli(clone, "ledger", *command, "--json", "-w", ".demo")
        assert as_json.returncode == 0
        for document in as_json.stdout.splitlines() if command[0] == "tail" else [as_json.stdout]:
            json.loads(document)
    told = cli(clone, "gate", "explain", "nano-0001", "-w", ".demo")
    assert told.returncode == 0 and "bpb" in told.stdout


def test_the_score_is_right_by_an_independent_count(finished: tuple[Path, str]) -> None:
    """From the artifact and the tokenizer alone: own windows, own softmax, bytes by decoding the text."""
    clone, _ = finished
    ledger = Ledger(clone / ".demo" / "ledger" / "autoresearch.jsonl")
    runs = [r.body.run for r in ledger.records() if isinstance(r.body, ControlEnded | StageEnded)]
    run = next(r for r in runs if r.split == "val")
    folder = clone / ".demo" / ".autoresearch" / "runs" / run.run_id
    bits, count = independent_bits(folder)
    assert run.artifact_bytes == (folder / "artifact.bin").stat().st_size
    assert run.eval_bytes == count
    assert math.isclose(run.val_bpb, bits / count, rel_tol=2e-6)


def independent_bits(folder: Path) -> tuple[float, int]:
    """(bits of the scored text, its bytes), without evaluate.py, bytecount.py or the shard reader."""
    import numpy as np
    import sentencepiece as spm
    import torch

    from trainer.export import load_artifact
    from trainer.model.gpt import build_model

    spec = json.loads((folder / "score_spec.json").read_text())
    knobs, state = load_artifact(folder / "artifact.bin")
    model = build_model(knobs)
    model.load_state_dict(state)
    data = Path(spec["data_dir"])
    (shard,) = data.glob("*_val_*.bin")
    stream = np.fromfile(shard, dtype="<u2", offset=1024).astype(np.int64)[: spec["max_tokens"]]
    length = spec["seq_len"]
    n = (len(stream) - 1) // length * length
    stream = torch.from_numpy(stream[: n + 1])
    with torch.no_grad():
        logits = model.logits(stream[:-1].view(-1, length)).double().reshape(n, -1)
    picked = logits.gather(1, stream[1:, None])[:, 0]
    nats = float((torch.logsumexp(logits, 1) - picked).sum())
    tokenizer = spm.SentencePieceProcessor(model_file=str(next(data.glob("*.model"))))
    ids: list[int] = stream.tolist()
    total = 0
    for start in [0, *[i for i, t in enumerate(ids) if t == 1 and i]]:
        end = next((i for i in range(start + 1, len(ids)) if ids[i] == 1), len(ids))
        pieces = [t for t in ids[start:end] if t != 1]
        # A document that goes on from before the window keeps its first piece's space only if it is scored.
        total += len(decode_bytes(tokenizer, pieces))
    first = [t for t in ids[:1] if t != 1]
    return nats / math.log(2), total - len(decode_bytes(tokenizer, first))


def decode_bytes(tokenizer: Any, ids: list[int]) -> bytes:
    """UTF-8 of a piece sequence, byte pieces included, the space that opens a document not counted."""
    out = b"".join(
        bytes([int(tokenizer.id_to_piece(t)[3:5], 16)]) if tokenizer.is_byte(t)
        else tokenizer.id_to_piece(t).replace("\u2581", " ").encode()
        for t in ids
    )
    return out[1:] if out.startswith(b" ") else out


def test_a_run_by_hand_twice_gives_the_same_bits(finished: tuple[Path, str]) -> None:
    clone, _ = finished
    out = [json.loads(cli(clone, "train", "--track", "nano/confirm", "--seed", "5", "--json",
                          AUTORESEARCH_DATA=str(DATA)).stdout) for _ in range(2)]
    same = ("val_bpb", "artifact_sha256", "final_train_loss", "artifact_bytes")
    assert {k: out[0][k] for k in same} == {k: out[1][k] for k in same}
    assert git(clone, "status", "--porcelain") == ""


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost_doubled_or_half_committed(checkout: Path) -> None:
    """SIGKILL to the whole process group, again and again; every acknowledged record stays, and the demo ends."""
    rng = random.Random(7)
    ledger = checkout / ".demo" / "ledger" / "autoresearch.jsonl"
    before: list[bytes] = []
    command = [sys.executable, "-P", "-m", "harness", "demo", "--track", "nano", "--plain", "--trials", "3"]
    for _ in range(25):
        process = subprocess.Popen(command, cwd=checkout, env=environment(checkout), start_new_session=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            out, _ = process.communicate(timeout=rng.uniform(0.3, 14.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        else:
            assert process.returncode == 0, out
            break
        if ledger.is_file():
            lines = ledger.read_bytes().split(b"\n")[:-1]
            assert lines[: len(before)] == before, "an acknowledged record was lost or changed"
            before = lines
    else:
        done = demo(checkout, "--trials", "3")
        assert done.returncode == 0, done.stdout + done.stderr
    assert ledger.read_bytes().split(b"\n")[: len(before)] == before
    assert_sound(checkout / ".demo", checkout)


@pytest.mark.slow
def test_one_interrupt_finishes_the_run_and_the_search_resumes(checkout: Path) -> None:
    command = [sys.executable, "-P", "-m", "harness", "demo", "--track", "nano", "--plain", "--trials", "2"]
    process = subprocess.Popen(command, cwd=checkout, env=environment(checkout), stdout=subprocess.PIPE, text=True)
    time.sleep(8)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "resumes" in out
    assert verify(checkout / ".demo" / "ledger" / "autoresearch.jsonl").ok
    done = demo(checkout, "--trials", "2")
    assert done.returncode == 0 and "resuming the unfinished demo" in done.stdout
    assert_sound(checkout / ".demo", checkout)
