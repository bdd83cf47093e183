"""What can go wrong with a ledger, each with enough in its message to act on."""

from __future__ import annotations

from pathlib import Path


class LedgerError(ValueError):
    """A ledger operation was refused; the message names what, why, and what to do."""


class LedgerCorrupt(LedgerError):
    """Bytes that were acknowledged have changed. Nothing is written or cut until a person has looked.

    ``line`` is 1-based (0: the file as a whole), ``offset`` is the byte where that line begins.
    """

    def __init__(self, path: Path | str, line: int, offset: int, reason: str, advice: str = "") -> None:
        self.path = str(path)
        self.line = line
        self.offset = offset
        self.reason = reason
        where = f"line {line}, byte {offset}" if line else f"byte {offset}"
        super().__init__(f"ledger {path} is damaged at {where}: {reason}. {advice or DAMAGE_ADVICE}")


class LedgerForked(LedgerError):
    """The working file and the published ref each hold records that the other lacks."""


class LedgerBusy(LedgerError):
    """Another process has held the append lock for too long."""


class LedgerPoisoned(LedgerError):
    """An fsync failed earlier: what is on disk is unknown, and this writer must not go on."""


class SearchLocked(LedgerError):
    """Another search owns this ledger; the message says which process."""


class BlobError(LedgerError):
    """A blob is missing, damaged, or cannot be stored."""


DAMAGE_ADVICE = (
    "Nothing was changed. Keep a copy of the file, then compare it with the stored history: "
    "`git show refs/autoresearch/ledger:autoresearch.jsonl`, and restore the good one by hand"
)
