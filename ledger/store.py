"""The ledger file: append one event so that it is never lost, read them all, mend a torn tail.

Append: take the append lock -> check what changed since last time -> mend a torn tail -> one write on
O_APPEND -> fsync -> only then return. A failed fsync poisons the writer: what the disk holds is unknown, so
that every later append is refused. Readers take no lock; they see whole, verified lines only.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import uuid_utils

from ledger import chain, decode
from ledger.chain import Cursor
from ledger.decode import Record
from ledger.durable import append_lock, atomic_write, explain, fsync_dir, write_all
from ledger.errors import LedgerCorrupt, LedgerError, LedgerPoisoned
from ledger.records import SCHEMA_VERSION, Body, Envelope, Genesis, Repair, Writer

INLINE_TORN_BYTES = 8 * 1024
"""Torn bytes up to this length are carried by the repair record itself (as hex), longer ones by a sidecar."""

_RESERVED = ("ledger.genesis", "ledger.repair")
_LOG = logging.getLogger(__name__)

__all__ = ["Ledger", "Record"]


def boot_id() -> str:
    """The kernel's id of this boot; "" where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class Ledger:
    """One ledger file. Objects are cheap: nothing is read before the first call that needs it.

    Safe for threads; many processes may append to one file. ``skipped`` counts what readers passed over
    ("type:<name>", "field:<type>.<path>", "invalid:<type>").
    """

    def __init__(self, path: Path) -> None:
        # Resolved, so that a link and its target share one lock file.
        self.path = Path(path).resolve()
        self.skipped: Counter[str] = Counter()
        self._mutex = threading.RLock()
        self._poison = ""
        self._boot = boot_id()
        self._forget()

    def _forget(self) -> None:
        self._cursor = Cursor()
        self._stat: tuple[int, int, int, int] | None = None
        self._tail = b""
        self._envelopes: list[Envelope] = []
        self._records: list[Record] = []
        self._decoded = 0
        self._sidecars_checked = False

    # -- reading ---------------------------------------------------------------------------------

    def head(self) -> tuple[int, str]:
        """``(seq, h)`` of the last record; ``(-1, 64 zeros)`` for a ledger that does not exist yet.

        Raises LedgerCorrupt, LedgerError.
        """
        with self._mutex:
            self._sync()
            return self._cursor.seq, self._cursor.h

    def records(
        self, types: Collection[str] | None = None, search: str | None = None, trial: str | None = None
    ) -> Iterator[Record]:
        """Records in order, as the file stands at the call. Raises LedgerCorrupt, LedgerError.

        ``types``, ``search`` and ``trial`` keep only matching records. Unknown event types and fields are
        left out and counted in ``skipped``.
        """
        with self._mutex:
            self._sync()
            for envelope in self._envelopes[self._decoded :]:
                record = decode.decode(envelope, self.skipped)
                if record is not None:
                    self._records.append(record)
            self._decoded = len(self._envelopes)
            snapshot = tuple(self._records)
        wanted = None if types is None else frozenset(types)
        return (
            record
            for record in snapshot
            if (wanted is None or record.type in wanted)
            and (search is None or record.search == search)
            and (trial is None or record.trial == trial)
        )

    @property
    def torn(self) -> bytes:
        """Bytes after the last whole line, as of the last read: a write under way, or a torn one."""
        return self._tail

    # -- writing ---------------------------------------------------------------------------------

    def append(self, type: str, body: Body, *, search: str = "", trial: str = "") -> Record:
        """Write one event and return it once it is on disk.

        The first append to a new file writes ``ledger.genesis`` before it. Raises LedgerError (refused, the
        file is as before), LedgerCorrupt (damage found; nothing written), LedgerPoisoned (fsync failed now
        or earlier: stop), LedgerBusy (lock not free).
        """
        if type in _RESERVED:
            raise LedgerError(f"{type} is written by the ledger itself; append the event that you mean")
        raw = chain.encode_body(type, body)
        with self._mutex:
            self._refuse_if_poisoned()
            # Everything that can be wrong with the record itself is found before the file is touched.
            chain.seal(self._envelope(type, raw, search, trial, Cursor(seq=10**15)))
            with append_lock(self.path):
                fd = self._open_for_append()
                try:
                    self._prepare(fd)
                    envelope = self._write(fd, type, raw, search, trial)
                finally:
                    os.close(fd)
        return Record.of(envelope, body)

    def repair(self) -> str:
        """Mend a torn tail now, under the lock. Returns what was done ("" if nothing); raises as append."""
        with self._mutex:
            self._refuse_if_poisoned()
            if not self.path.exists():
                return ""
            with append_lock(self.path):
                fd = self._open_for_append()
                try:
                    return self._prepare(fd, genesis=False)
                finally:
                    os.close(fd)

    def _refuse_if_poisoned(self) -> None:
        if self._poison:
            raise LedgerPoisoned(
                f"an earlier fsync of {self.path} failed ({self._poison}): what the disk holds is unknown. "
                "Stop, check the disk (dmesg, free space), run `autoresearch ledger verify`, start again"
            )

    def _open_for_append(self) -> int:
        try:
            try:
                return os.open(self.path, os.O_RDWR | os.O_APPEND)
            except FileNotFoundError:
                if self._cursor.offset:
                    reason = "the file has vanished since it was read"
                    raise LedgerCorrupt(self.path, 0, 0, reason, _VANISHED) from None
                fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
                fsync_dir(self.path.parent)
                return fd
        except OSError as error:
            raise explain(error, self.path, "open for writing") from error

    def _prepare(self, fd: int, genesis: bool = True) -> str:
        """With the lock held: verify what is new, mend the tail, make sure of the genesis record."""
        self._sync()
        done: list[str] = []
        if self._tail:
            done.append(self._mend(fd))
        if self._cursor.seq < 0 and genesis:
            genesis_body = chain.encode_body("ledger.genesis", Genesis(schema=SCHEMA_VERSION))
            self._write(fd, "ledger.genesis", genesis_body)
        if self._cursor.seq >= 0 and not self._sidecars_checked:
            done += self._record_sidecars(fd)
            self._sidecars_checked = True
        return "; ".join(text for text in done if text)

    def _envelope(self, type: str, body: msgspec.Raw, search: str, trial: str, after: Cursor) -> Envelope:
        return Envelope(
            v=SCHEMA_VERSION,
            seq=after.seq + 1,
            id=str(uuid_utils.uuid7()),
            type=type,
            ts=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            writer=Writer(host=socket.gethostname(), pid=os.getpid(), boot=self._boot),
            search=search,
            trial=trial,
            body=body,
            prev=after.h,
            h="",
        )

    def _write(self, fd: int, type: str, body: msgspec.Raw, search: str = "", trial: str = "") -> Envelope:
        envelope = self._envelope(type, body, search, trial, self._cursor)
        line, h = chain.seal(envelope)
        envelope = msgspec.structs.replace(envelope, h=h)
        start = self._cursor.offset
        try:
            write_all(fd, line)
        except OSError as error:
            self._roll_back(fd, start)
            raise explain(error, self.path, "write to") from error
        self._fsync(fd)
        status = os.fstat(fd)
        if status.st_nlink == 0 or status.st_size != start + len(line):
            raise LedgerError(
                f"{self.path} was replaced or changed, while a record was written, by something that does "
                "not take its lock (git checkout, an editor?); the record counts as not recorded. Run again"
            )
        self._envelopes.append(envelope)
        self._cursor = Cursor(start + len(line), envelope.seq, h)
        self._stat = _key(status)
        self._tail = b""
        return envelope

    def _roll_back(self, fd: int, size: int) -> None:
        """A write failed half way (disk full): leave the file as it was."""
        try:
            os.ftruncate(fd, size)
        except OSError as error:
            self._poison = f"undoing a half-written record failed too: {error.strerror}"
            return
        self._fsync(fd)

    def _fsync(self, fd: int) -> None:
        try:
            os.fsync(fd)
        except OSError as error:
            self._poison = error.strerror or str(error)
            raise LedgerPoisoned(
                f"fsync of {self.path} failed: {self._poison}. The record is not acknowledged, and this "
                "process writes no more: after a failed fsync the kernel may drop what it could not write. "
                "Check the disk (dmesg, free space), run `autoresearch ledger verify`, start again"
            ) from error

    # -- torn tails ------------------------------------------------------------------------------

    def _mend(self, fd: int) -> str:
        tail = chain.judge_tail(self._tail, self._cursor, self.path)
        start = self._cursor.offset + len(tail.record)
        try:
            if tail.torn:
                save_torn(self.path, tail.torn)
                os.ftruncate(fd, start)
            if tail.record:
                write_all(fd, b"\n")
        except OSError as error:
            raise explain(error, self.path, "mend the torn tail of") from error
        self._fsync(fd)
        self._sidecars_checked = self._sidecars_checked and not tail.torn
        if tail.record:
            found = chain.scan(tail.record + b"\n", self._cursor, self.path)
            self._envelopes += found.envelopes
            self._cursor = found.cursor
        self._tail = b""
        self._stat = _key(os.fstat(fd))
        return f"record {self._cursor.seq} lacked only its newline" if tail.record else ""

    def _record_sidecars(self, fd: int) -> list[str]:
        """Write ``ledger.repair`` for torn bytes that no record carries yet; drop sidecars it carries whole.

        Torn bytes are put aside before they are cut, so that a kill at any instant of a repair loses nothing.
        """
        prefix = f"{self.path.name}.torn-"
        sidecars = sorted(item for item in self.path.parent.iterdir() if item.name.startswith(prefix))
        if not sidecars:
            return []
        repairs = (record.body for record in self.records(["ledger.repair"]))
        known = {body.sha256 for body in repairs if isinstance(body, Repair)}
        done: list[str] = []
        for sidecar in sidecars:
            try:
                torn = sidecar.read_bytes()
            except OSError as error:
                raise explain(error, sidecar, "read") from error
            sha = hashlib.sha256(torn).hexdigest()
            short = len(torn) <= INLINE_TORN_BYTES
            if sha not in known:
                body = Repair(
                    torn_bytes=len(torn),
                    torn_hex=torn.hex() if short else "",
                    sidecar="" if short else sidecar.name,
                    sha256=sha,
                )
                self._write(fd, "ledger.repair", chain.encode_body("ledger.repair", body))
                done.append(f"{len(torn)} torn bytes were cut off and kept ({sha[:12]})")
                _LOG.warning("%s: %s", self.path, done[-1])
            if short:
                sidecar.unlink(missing_ok=True)
        return done

    # -- keeping up with the file ----------------------------------------------------------------

    def _sync(self) -> None:
        """Verify what was added since the last look. Without the lock the tail may be a write under way."""
        try:
            status = self.path.stat()
            if self._stat == _key(status):
                return
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                self._catch_up(file.fileno(), status)
        except FileNotFoundError:
            if self._cursor.offset:
                reason = "the file has vanished since it was read"
                raise LedgerCorrupt(self.path, 0, 0, reason, _VANISHED) from None
        except OSError as error:
            raise explain(error, self.path, "read") from error

    def _catch_up(self, fd: int, status: os.stat_result) -> None:
        known = self._cursor
        if status.st_size < known.offset:
            reason = f"{known.offset} bytes were verified, {status.st_size} are left"
            raise LedgerCorrupt(self.path, 0, status.st_size, reason, _VANISHED)
        same_file = self._stat is not None and self._stat[0] == status.st_ino
        grown = status.st_size > known.offset + len(self._tail)
        if not (same_file and grown):
            # Another inode, or bytes changed in place: trust nothing, then require our history in it.
            known = Cursor()
        found = chain.scan(_read(fd, known.offset, status.st_size), known, self.path)
        if known.offset:
            self._envelopes += found.envelopes
        else:
            self._replace(found)
        self._cursor = found.cursor
        self._tail = found.tail
        self._stat = _key(status)

    def _replace(self, found: chain.Scan) -> None:
        mine = self._cursor
        if mine.seq >= 0 and (found.cursor.seq < mine.seq or found.envelopes[mine.seq].h != mine.h):
            reason = "the file was replaced by one without the records already read"
            raise LedgerCorrupt(self.path, mine.seq + 1, 0, reason, _VANISHED)
        self._envelopes[mine.seq + 1 :] = found.envelopes[mine.seq + 1 :]


_VANISHED = (
    "Someone reset, cleaned or replaced it. Stop every search, then start `autoresearch search` again: it "
    "compares the file with refs/autoresearch/ledger and restores what is missing"
)


def save_torn(path: Path, torn: bytes) -> Path:
    """Keep torn bytes of the ledger ``path`` in a file beside it, durably; the next append records them.

    Raises OSError.
    """
    sidecar = path.with_name(f"{path.name}.torn-{hashlib.sha256(torn).hexdigest()[:16]}")
    atomic_write(sidecar, torn)
    return sidecar


def _key(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _read(fd: int, offset: int, end: int) -> bytes:
    chunks: list[bytes] = []
    while offset < end and (chunk := os.pread(fd, end - offset, offset)):
        chunks.append(chunk)
        offset += len(chunk)
    return b"".join(chunks)
