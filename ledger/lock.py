"""One search per ledger: a lock that knows its owner, is never stolen from the living, and dies with him.

The kernel's flock decides; the file's text (pid, host, boot, start, command) only says who it is. A killed
owner's lock is free at once, so there is nothing to time out, to break or to clean up.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import time
import weakref
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import msgspec

from ledger.durable import explain, make_dirs, write_all
from ledger.errors import SearchLocked
from ledger.store import boot_id

_PATIENCE_S = 0.3
"""How long an attempt goes on: `SearchLock.owner` of another process takes the lock for an instant."""


class Owner(msgspec.Struct, frozen=True):
    """Who holds a search lock."""

    pid: int
    host: str
    boot: str
    started: str  # UTC, RFC 3339
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, running since {self.started}: {self.command}"


class SearchLock:
    """``with SearchLock(path): ...`` or ``acquire()`` / ``release()``. Not for sharing between threads."""

    def __init__(self, path: Path, command: str = "") -> None:
        self.path = Path(path)
        self.command = command or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]).strip()
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    def acquire(self) -> Owner:
        """Take the lock and write who holds it.

        Raises SearchLocked naming the living owner, LedgerError where the file cannot be written.
        """
        if self._fd is not None:
            raise SearchLocked(f"{self.path} is already held by this very object")
        try:
            make_dirs(self.path.parent)
            fd = self._take()
        except OSError as error:
            raise explain(error, self.path, "lock") from error
        me = Owner(
            pid=os.getpid(),
            host=socket.gethostname(),
            boot=boot_id(),
            started=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            command=self.command,
        )
        try:
            os.ftruncate(fd, 0)
            write_all(fd, msgspec.json.encode(me) + b"\n")
            os.fsync(fd)
        except OSError as error:
            os.close(fd)
            raise explain(error, self.path, "write") from error
        self._fd = fd
        _HELD.add(self)
        return me

    def _take(self) -> int:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Somebody may have removed or replaced the file between open and flock.
                if _same_file(fd, self.path):
                    return fd
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    owner = _read_owner(fd)
                    os.close(fd)
                    raise SearchLocked(_refusal(self.path, owner)) from None
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
            time.sleep(0.02)

    def release(self) -> None:
        """Give the lock back; nothing happens if it is not held. The file stays."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        _HELD.discard(self)
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)

    def owner(self) -> Owner | None:
        """The living owner, whoever it is; None when the lock is free (whatever the file says).

        An owner who has not yet written his name has pid 0. Raises LedgerError where the file cannot be read.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise explain(error, self.path, "read") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            return _read_owner(fd)
        finally:
            os.close(fd)

    def __enter__(self) -> SearchLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _same_file(fd: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _read_owner(fd: int) -> Owner:
    try:
        return msgspec.json.decode(os.pread(fd, 65536, 0), type=Owner)
    except msgspec.MsgspecError:
        return Owner(pid=0, host="this machine", boot="", started="a moment ago", command="(starting)")


def _refusal(path: Path, owner: Owner) -> str:
    return (
        f"another search holds {path}: {owner}. Stop it cleanly "
        f"with `kill -INT {owner.pid or 'PID'}` on {owner.host} and wait. The lock is free the moment that "
        "process ends, however it ends: never delete the file"
    )


_HELD: weakref.WeakSet[SearchLock] = weakref.WeakSet()


def _drop_in_child() -> None:
    """A forked child shares its parent's flock: without this it would outlive a killed parent."""
    for lock in list(_HELD):
        if lock._fd is not None:
            os.close(lock._fd)
            lock._fd = None
    _HELD.clear()


os.register_at_fork(after_in_child=_drop_in_child)
