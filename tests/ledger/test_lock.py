"""One search per ledger: refused while the owner lives, free as soon as he is dead."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ledger.errors import LedgerError, SearchLocked
from ledger.lock import SearchLock

ROOT = Path(__file__).parents[2]

_HOLDER = """
import os, sys, time
from pathlib import Path
from ledger.lock import SearchLock
lock = SearchLock(Path(sys.argv[1]), command="autoresearch search --track pocket")
lock.acquire()
if sys.argv[2] == "fork":
    reader, tell = os.pipe()
    if os.fork() == 0:
        os.write(tell, b"up")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 2)
if sys.argv[2] == "child":
    import subprocess
    subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
print("held", flush=True)
sys.stdin.readline()
"""


def holder(path: Path, kind: str = "plain") -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path), kind],
        cwd=ROOT,
        stdin=pipe,
        stdout=pipe,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    """Kill the holder's whole group (its forked children too)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait(timeout=30)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "search.lock"
    process = holder(path)
    try:
        with pytest.raises(SearchLocked) as caught:
            SearchLock(path).acquire()
        for word in (f"process {process.pid} ", "autoresearch search --track pocket", f"kill -INT {process.pid}"):
            assert word in str(caught.value)
        owner = SearchLock(path).owner()
        assert owner is not None and owner.pid == process.pid
    finally:
        end(process)


@pytest.mark.parametrize("kind", ["plain", "fork", "child"])
def test_kill_9_frees_the_lock_even_if_children_live_on(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "search.lock"
    process = holder(path, kind)
    try:
        os.kill(process.pid, 9)
        process.wait(timeout=30)
        assert "search --track" in path.read_text()  # the dead man's name is still there
        assert SearchLock(path).owner() is None
        with SearchLock(path) as lock:
            assert lock.held
    finally:
        end(process)


def test_release_and_take_again_in_one_process(tmp_path: Path) -> None:
    path = tmp_path / "search.lock"
    first, second = SearchLock(path), SearchLock(path, command="other")
    assert first.owner() is None
    first.acquire()
    with pytest.raises(SearchLocked, match=f"process {os.getpid()}"):
        second.acquire()
    with pytest.raises(SearchLocked, match="this very object"):
        first.acquire()
    first.release()
    first.release()
    me = second.acquire()
    assert me.pid == os.getpid() and first.owner() == me
    second.release()
    assert path.exists() and first.owner() is None


def test_an_old_lock_is_never_stolen_from_the_living(tmp_path: Path) -> None:
    path = tmp_path / "search.lock"
    process = holder(path)
    try:
        os.utime(path, (0, 0))
        with pytest.raises(SearchLocked):
            SearchLock(path).acquire()
    finally:
        end(process)


def test_an_unreadable_owner_still_holds(tmp_path: Path) -> None:
    path = tmp_path / "search.lock"
    process = holder(path)
    try:
        path.write_text('{"pid": ')
        with pytest.raises(SearchLocked, match="starting"):
            SearchLock(path).acquire()
    finally:
        end(process)


def test_a_file_removed_between_open_and_lock_is_not_taken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "search.lock"
    real, calls = fcntl.flock, []

    def remove_first(fd: int, operation: int) -> None:
        if not calls:
            path.unlink()
        calls.append(operation)
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with SearchLock(path):
        monkeypatch.setattr(fcntl, "flock", real)
        with pytest.raises(SearchLocked):  # what is held is the file that others find
            SearchLock(path).acquire()


def test_a_place_that_cannot_hold_a_lock(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="cannot lock"):
        SearchLock(tmp_path / "file" / "search.lock").acquire()
