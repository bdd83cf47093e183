"""A second home for the ledger: its content as commits under a git ref, by plumbing alone.

Nothing of the user's is touched: no index, no branch, no working tree. Each commit holds one file,
``autoresearch.jsonl``, and a ``Ledger-Head: <seq>:<h> <bytes>`` trailer. As lines are hash-chained, that one
hash tells whether a working file still contains all that was published.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from ledger import chain
from ledger.chain import Cursor, Scan
from ledger.durable import append_lock, atomic_write, explain
from ledger.errors import LedgerCorrupt, LedgerError, LedgerForked
from ledger.store import Ledger, save_torn

REF = "refs/autoresearch/ledger"
BLOB_NAME = "autoresearch.jsonl"
GIT_TIMEOUT_S = 120.0
PACK_AFTER = 32
"""Publications after which their objects are packed. Each is a whole copy of the ledger, almost equal to the
one before: 64 of a 10.9 MB ledger took 66 MB loose and 0.9 MB as deltas, packed in 3 s on one core."""

_IDENTITY = {
    "GIT_AUTHOR_NAME": "autoresearch",
    "GIT_AUTHOR_EMAIL": "autoresearch@localhost",
    "GIT_COMMITTER_NAME": "autoresearch",
    "GIT_COMMITTER_EMAIL": "autoresearch@localhost",
}
_LOG = logging.getLogger(__name__)
_ROUTING = re.compile(r"GIT_(?!CONFIG|CEILING|EXEC_PATH|SSH|TRACE)")
_TRAILER = re.compile(r"^Ledger-Head: (\d+):([0-9a-f]{64}) (\d+)$", re.MULTILINE)


class Published(NamedTuple):
    """What the ref holds: commit id, and the head of the ledger in it."""

    commit: str
    cursor: Cursor


def publish_ref(repo: Path, ledger_path: Path, ref: str = REF) -> str:
    """Store the ledger's whole records under ``ref`` and return the commit id ("" for an empty ledger).

    A commit is added only if there is something new. Raises LedgerCorrupt (damage is never published),
    LedgerForked (the ref holds records that the file lacks), LedgerError (git failed, or raced thrice).
    """
    ledger_path = ledger_path.resolve()
    commit = ""
    for attempt in range(3):
        data, found = _read_whole(ledger_path)
        published = _published(repo, ref)
        if not found.envelopes:
            if published:
                raise LedgerForked(_lost(ledger_path, ref, published))
            return ""
        if published:
            if not _contains(data, published.cursor):
                raise LedgerForked(_lost(ledger_path, ref, published))
            if published.cursor == found.cursor:
                return published.commit
        commit = _commit(repo, data, found, published)
        try:
            _git(repo, "update-ref", ref, commit, published.commit if published else "0" * len(commit))
            break
        except LedgerError:
            if attempt == 2:
                raise
    _pack(repo, ref)
    return commit


def _pack(repo: Path, ref: str) -> None:
    """Now and then turn the ref's loose copies into deltas; what is published is safe either way."""
    try:
        loose = _git_bytes(repo, "rev-list", "--objects", "--unpacked", ref)
        if loose.count(b"\n") < 3 * PACK_AFTER:  # commit, tree, blob
            return
        base = _git(repo, "rev-parse", "--git-path", "objects/pack/pack")
        # Neighbours in history are the best bases there are: a longer search only costs time.
        _git(repo, "pack-objects", "-q", "--window=1", "--threads=1", "--delta-base-offset", base, stdin=loose)
        _git(repo, "prune-packed", "-q")
    except LedgerError as error:
        _LOG.warning("the copies under %s were not packed: %s", ref, error)


def reconcile(repo: Path, ledger_path: Path, ref: str = REF) -> str:
    """Bring the working file and ``ref`` together at start. Returns a notice whose first word is the state.

    ``new`` (neither exists), ``unpublished`` (no ref yet), ``equal``, ``extends`` (the file is ahead:
    publish), ``restored`` (the file was missing or behind, and is whole again). A torn tail is mended, or,
    where the ref has the whole record, replaced by it. Raises LedgerForked with instructions, LedgerCorrupt,
    LedgerError.
    """
    ledger_path = ledger_path.resolve()
    published = _published(repo, ref)
    if published is None:
        return _without_ref(ledger_path, ref)
    stored = _git_bytes(repo, "cat-file", "blob", f"{published.commit}:{BLOB_NAME}")
    there = chain.scan(stored, Cursor(), f"{ref}:{BLOB_NAME}")
    with append_lock(ledger_path):
        data = _read(ledger_path)
        try:
            here = chain.scan(data, Cursor(), ledger_path)
        except LedgerCorrupt as error:
            raise _with_recovery(error, ledger_path, ref, there) from error
        whole = data[: here.cursor.offset]
        behind = len(whole) < len(stored)
        if behind and stored.startswith(whole):
            return _restore(ledger_path, ref, stored, data, here, there)
        if not whole.startswith(stored):
            raise LedgerForked(_fork(ledger_path, ref, here, there))
    mended = Ledger(ledger_path).repair()
    notes = f"; {mended}" if mended else ""
    ahead = here.cursor.seq - there.cursor.seq
    if ahead:
        return f"extends: {ledger_path} has {ahead} records more than {ref}{notes}"
    return f"equal: {ledger_path} and {ref} hold the same {here.cursor.seq + 1} records{notes}"


def _without_ref(ledger_path: Path, ref: str) -> str:
    ledger = Ledger(ledger_path)
    mended = ledger.repair()
    seq, _ = ledger.head()
    if seq < 0:
        return f"new: neither {ledger_path} nor {ref} holds a record yet"
    notes = f"; {mended}" if mended else ""
    return f"unpublished: {ledger_path} holds {seq + 1} records, {ref} none{notes}"


def _restore(ledger_path: Path, ref: str, stored: bytes, data: bytes, here: Scan, there: Scan) -> str:
    """With the lock held: the working file is a prefix (perhaps torn) of what the ref holds."""
    have, want = here.cursor.seq + 1, there.cursor.seq + 1
    try:
        if not stored.startswith(data):
            save_torn(ledger_path, here.tail)  # a half-written record that the ref never saw: keep its bytes
        existed = ledger_path.exists()
        mode = ledger_path.stat().st_mode & 0o777 if existed else 0o644
        atomic_write(ledger_path, stored, mode)
    except OSError as error:
        raise explain(error, ledger_path, "restore") from error
    was = f"held {have} of {want} records" if existed else f"was missing ({want} records)"
    return f"restored: {ledger_path} {was}, as after a git reset or clean; it is whole again, from {ref}"


def _commit(repo: Path, data: bytes, found: Scan, published: Published | None) -> str:
    content = data[: found.cursor.offset]
    blob = _git(repo, "hash-object", "-w", "--stdin", "--no-filters", stdin=content)
    tree = _git(repo, "mktree", stdin=f"100644 blob {blob}\t{BLOB_NAME}\n".encode())
    message = (
        f"ledger: {found.cursor.seq + 1} records\n\n"
        f"Ledger-Head: {found.cursor.seq}:{found.cursor.h} {found.cursor.offset}\n"
    )
    parent = ["-p", published.commit] if published else []
    date = found.envelopes[-1].ts
    extra = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
    return _git(repo, "commit-tree", tree, *parent, "-F", "-", stdin=message.encode(), extra=extra)


def _published(repo: Path, ref: str) -> Published | None:
    text = _git(repo, "for-each-ref", "--format=%(objectname)%0a%(contents)", ref)
    if not text:
        return None
    commit, _, message = text.partition("\n")
    trailer = _TRAILER.search(message)
    if trailer is None:
        raise LedgerError(
            f"{ref} in {repo} points at {commit[:12]}, which has no Ledger-Head trailer: something else "
            f"wrote it. Look with `git show {ref}`; if it is of no use, `git update-ref -d {ref}`"
        )
    return Published(commit, Cursor(int(trailer[3]), int(trailer[1]), trailer[2]))


def _contains(data: bytes, head: Cursor) -> bool:
    """Whether chained ``data`` begins with exactly the records that end at ``head``."""
    return data[: head.offset].endswith(b',"h":"' + head.h.encode() + b'"}\n') and len(data) >= head.offset


def _read(ledger_path: Path) -> bytes:
    try:
        return ledger_path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise explain(error, ledger_path, "read") from error


def _read_whole(ledger_path: Path) -> tuple[bytes, Scan]:
    data = _read(ledger_path)
    return data, chain.scan(data, Cursor(), ledger_path)


# -- messages ------------------------------------------------------------------------------------


def _lost(ledger_path: Path, ref: str, published: Published) -> str:
    return (
        f"{ledger_path} no longer holds record {published.cursor.seq} ({published.cursor.h[:12]}...) that "
        f"{ref} has: someone reset, cleaned or replaced the file. Nothing was published. Stop the search and "
        "start it again: at start the two are compared, and the file is restored where that is safe"
    )


def _fork(ledger_path: Path, ref: str, here: Scan, there: Scan) -> str:
    shared = 0
    for left, right in zip(here.envelopes, there.envelopes, strict=False):
        if left.h != right.h:
            break
        shared += 1
    return (
        f"{ledger_path} ({here.cursor.seq + 1} records) and {ref} ({there.cursor.seq + 1} records) share "
        f"{shared} records and then differ: two histories. Nothing was changed. Look at the other one with "
        f"`git show {ref}:{BLOB_NAME}`. To keep the working file: `git update-ref {ref}-old {ref}` and "
        f"`git update-ref -d {ref}`. To keep the stored one: move {ledger_path.name} aside. Then start again"
    )


def _with_recovery(error: LedgerCorrupt, ledger_path: Path, ref: str, there: Scan) -> LedgerCorrupt:
    advice = (
        f"Nothing was changed. {ref} holds a good history of {there.cursor.seq + 1} records: move "
        f"{ledger_path.name} aside and start again to get it back, then compare the two"
    )
    return LedgerCorrupt(ledger_path, error.line, error.offset, error.reason, advice)


# -- git -----------------------------------------------------------------------------------------


def _git(repo: Path, *args: str, stdin: bytes = b"", extra: dict[str, str] | None = None) -> str:
    return _git_bytes(repo, *args, stdin=stdin, extra=extra).decode("utf-8", "replace").strip()


def _git_bytes(repo: Path, *args: str, stdin: bytes = b"", extra: dict[str, str] | None = None) -> bytes:
    # Inside a hook git sets GIT_DIR, GIT_INDEX_FILE and more: they would send us elsewhere.
    env = {name: value for name, value in os.environ.items() if not _ROUTING.match(name)}
    env |= {**_IDENTITY, "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", **(extra or {})}
    command = ["git", "-C", str(repo), "-c", "core.fsync=all", *args]
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, env=env, timeout=GIT_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise LedgerError("there is no `git` on PATH: the ledger's second copy needs it") from None
    except subprocess.TimeoutExpired:
        raise LedgerError(
            f"git {args[0]} in {repo} took longer than {GIT_TIMEOUT_S:g} s: is the disk hung?"
        ) from None
    if done.returncode:
        reason = done.stderr.decode("utf-8", "replace").strip() or f"exit status {done.returncode}"
        raise LedgerError(f"git {args[0]} failed in {repo}: {reason}")
    return done.stdout
