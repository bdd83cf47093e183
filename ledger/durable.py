"""Small file operations that survive a power cut: fsync of files and folders, atomic replacement, flock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from ledger.errors import LedgerBusy, LedgerError

LOCK_TIMEOUT_S = 60.0
"""An append takes milliseconds: a lock held this long belongs to a stopped process."""


def explain(error: OSError, path: Path, doing: str) -> LedgerError:
    """A clear error for a failed system call on ``path``."""
    reason = error.strerror or str(error)
    return LedgerError(
        f"cannot {doing} {path}: {reason}. "
        "The ledger needs a local folder that this user may write to, with free space; nothing was recorded"
    )


def write_all(fd: int, data: bytes) -> None:
    """Write every byte, also when the kernel takes only part of them. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.write(fd, view)
        if written <= 0:
            raise OSError(5, "write returned 0 bytes")
        view = view[written:]


def fsync_dir(folder: Path) -> None:
    """Make creations, renames and removals in ``folder`` durable. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dirs(folder: Path) -> None:
    """``mkdir -p`` whose new entries are durable. Raises OSError."""
    if folder.is_dir():
        return
    make_dirs(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    fsync_dir(folder.parent)


def atomic_write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace ``path`` by ``data``: after a crash it holds the old content or the new. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_dir(path.parent)


def lock_path(path: Path) -> Path:
    """The permanent lock file that guards appends to ``path``; it is never removed."""
    return path.with_name(path.name + ".lock")


@contextlib.contextmanager
def append_lock(path: Path, timeout_s: float | None = None) -> Iterator[None]:
    """Hold the append lock of the ledger ``path``.

    Raises LedgerBusy after ``timeout_s`` (default LOCK_TIMEOUT_S), LedgerError where the lock file cannot
    be opened. The kernel drops the lock when its holder dies, however it dies.
    """
    guard = lock_path(path)
    try:
        make_dirs(path.parent)
        fd = os.open(guard, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise explain(error, guard, "open the lock file") from error
    try:
        _wait_for(fd, guard, LOCK_TIMEOUT_S if timeout_s is None else timeout_s)
        try:
            yield
        finally:
            # Not left to close(): a child forked meanwhile still holds a copy of the descriptor.
            fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def _wait_for(fd: int, guard: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    pause = 0.0005
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise LedgerBusy(
                    f"another process has held {guard} for {timeout_s:g} s; an append takes milliseconds, so "
                    f"it is probably stopped. Find it with `fuser -v {guard}`; the lock is free when it ends"
                ) from None
            time.sleep(pause)
            pause = min(pause * 2, 0.02)
        except OSError as error:
            raise explain(error, guard, "lock") from error
