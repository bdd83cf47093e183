"""A disk that fails: fsync errors, short writes, full disks, no permission."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ledger.durable import append_lock
from ledger.errors import LedgerBusy, LedgerError, LedgerPoisoned
from ledger.records import Note
from ledger.store import Ledger
from tests.ledger.plain import read_file
from tests.ledger.samples import fill

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / "ledger.jsonl")
    fill(made, 3)
    return made


def test_a_failed_fsync_poisons_the_writer(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(LedgerPoisoned, match="not acknowledged"):
        ledger.append("note", Note(text="lost?"))
    monkeypatch.setattr(os, "fsync", real)
    size = ledger.path.stat().st_size
    for _ in range(3):
        with pytest.raises(LedgerPoisoned, match="Input/output error"):
            ledger.append("note", Note(text="x"))
        with pytest.raises(LedgerPoisoned):
            ledger.repair()
    assert ledger.path.stat().st_size == size


def test_nothing_is_acknowledged_before_file_and_folder_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "ledger.jsonl"
    real, synced = os.fsync, []

    def note(fd: int) -> None:
        target = Path(f"/proc/self/fd/{fd}").readlink()
        synced.append((target, target.stat().st_size if target.is_file() else 0))
        real(fd)

    monkeypatch.setattr(os, "fsync", note)
    Ledger(path).append("note", Note(text="x"))
    assert (tmp_path, 0) in synced and (path.parent, 0) in synced
    assert synced[-1] == (path, path.stat().st_size)


def test_short_writes_are_continued(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:7]))
    ledger.append("note", Note(text="in pieces"))
    monkeypatch.setattr(os, "write", real)
    assert read_file(ledger.path)[-1]["body"]["text"] == "in pieces"


def test_a_full_disk_leaves_the_file_as_it_was(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    real, before, calls = os.write, ledger.path.read_bytes(), []

    def full(fd: int, data: bytes) -> int:
        calls.append(fd)
        if len(calls) == 1:
            return real(fd, bytes(data)[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(LedgerError, match="No space left"):
        ledger.append("note", Note(text="x"))
    monkeypatch.setattr(os, "write", real)
    assert ledger.path.read_bytes() == before
    ledger.append("note", Note(text="space again"))
    assert len(read_file(ledger.path)) == 5


def test_a_file_swapped_during_the_write_is_not_acknowledged(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, data = os.write, ledger.path.read_bytes()

    def swap(fd: int, line: bytes) -> int:
        ledger.path.unlink()
        ledger.path.write_bytes(data)
        return real(fd, line)

    monkeypatch.setattr(os, "write", swap)
    with pytest.raises(LedgerError, match="not recorded"):
        ledger.append("note", Note(text="into the void"))
    monkeypatch.setattr(os, "write", real)
    ledger.append("note", Note(text="here"))
    assert [r["body"].get("text") for r in read_file(ledger.path)][-1] == "here"
    assert len(read_file(ledger.path)) == 5


def test_a_lock_that_is_never_given_back_is_an_error_not_a_hang(ledger: Ledger) -> None:
    with append_lock(ledger.path), pytest.raises(LedgerBusy, match="fuser"):  # noqa: SIM117
        with append_lock(ledger.path, timeout_s=0.05):
            raise AssertionError("two holders")


_AS_NOBODY = """
import os, sys
from pathlib import Path
from ledger.errors import LedgerError
from ledger.records import Note
from ledger.store import Ledger
ledger = Ledger(Path(sys.argv[1]))
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
try:
    ledger.append("note", Note(text="x"))
except LedgerError as error:
    print(error)
print(len(list(ledger.records())))
"""


def test_without_permission_reading_works_and_writing_says_why(ledger: Ledger) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder, path = Path(name), Path(name) / ledger.path.name
        before = ledger.path.read_bytes()
        path.write_bytes(before)
        path.with_name(path.name + ".lock").touch()
        for p, mode in ((path, 0o444), (path.with_name(path.name + ".lock"), 0o444), (folder, 0o555)):
            p.chmod(mode)
        command = [sys.executable, "-c", _AS_NOBODY, str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        after = path.read_bytes()
        folder.chmod(0o755)
    message, count = done.stdout.strip().splitlines()
    assert "Permission denied" in message and "ledger.jsonl" in message, done.stderr
    assert count == "4"
    assert after == before
