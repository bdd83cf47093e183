"""Several writers at once, and writers killed at any instant."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ledger.store import Ledger
from ledger.verify import verify
from tests.ledger.plain import read_file

ROOT = Path(__file__).parents[2]

_WRITER = """
import itertools, sys
from pathlib import Path
from ledger.records import Note
from ledger.store import Ledger
path, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
ledger = Ledger(path)
if count:
    sys.stdin.readline()  # wait for the others
for index in range(count) if count else itertools.count():
    text = f"{name}-{index}"
    record = ledger.append("note", Note(text=text + " " * (index % 50 * 40)))
    print(text, record.seq, record.h, flush=True)
"""


def writer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _WRITER, str(path), name, str(count)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def acknowledged(output: str) -> list[tuple[str, int, str]]:
    """What a writer said after ``append`` returned; a line cut by the kill does not count."""
    lines = output.splitlines(keepends=True)
    parts = [line.split() for line in lines if line.endswith("\n")]
    return [(text, int(seq), h) for text, seq, h in parts]


def test_two_processes_append_200_each_and_none_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    both = [writer(path, name, 200) for name in ("a", "b")]
    time.sleep(0.3)  # both are up, so that they really collide
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    records = {record["seq"]: record for record in read_file(path)}
    assert len(records) == 401
    said = [item for output, _ in outputs for item in acknowledged(output)]
    assert len(said) == 400
    for text, seq, h in said:
        assert (records[seq]["body"]["text"].strip(), records[seq]["h"]) == (text, h)


def kill_writers(path: Path, rounds: int, seed: int) -> int:
    """Kill writers at random instants; every acknowledged record must be there. Returns how many were."""
    rng = random.Random(seed)
    said: dict[int, tuple[str, str]] = {}
    for turn in range(rounds):
        process = writer(path, f"r{turn}", 0)
        assert process.stdout is not None
        first = process.stdout.readline()  # it is writing now
        time.sleep(rng.random() * 0.02)
        process.kill()
        rest, _ = process.communicate(timeout=60)
        for text, seq, h in acknowledged(first + rest):
            assert seq not in said
            said[seq] = (text, h)
        whole = path.read_bytes()
        whole = whole[: whole.rindex(b"\n") + 1]
        path_copy = path.with_suffix(".copy")
        path_copy.write_bytes(whole)
        records = {record["seq"]: record for record in read_file(path_copy)}
        for seq, (text, h) in said.items():
            assert (records[seq]["body"]["text"].strip(), records[seq]["h"]) == (text, h)
    assert Ledger(path).head()[0] >= max(said)
    assert verify(path).ok
    return len(said)


def test_acknowledged_records_survive_kill_9(tmp_path: Path) -> None:
    assert kill_writers(tmp_path / "ledger.jsonl", rounds=6, seed=1) >= 6


@pytest.mark.slow
def test_acknowledged_records_survive_kill_9_a_hundred_times(tmp_path: Path) -> None:
    assert kill_writers(tmp_path / "ledger.jsonl", rounds=100, seed=2) >= 100
