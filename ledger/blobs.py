"""Whatever is too long for a ledger line, in files named by their SHA-256: logs, diffs, curves, prompts.

A blob is durable before ``put`` returns, so that a record written afterwards never cites what is not there.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ledger.durable import atomic_write, explain, fsync_dir, make_dirs
from ledger.errors import BlobError

_SHA = re.compile(r"[0-9a-f]{64}")


class BlobStore:
    """A folder of blobs, ``<root>/<first two hex>/<64 hex>``. Safe for several processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def path(self, sha: str) -> Path:
        """Where the blob ``sha`` lies, or would. Raises BlobError unless ``sha`` is 64 hex digits."""
        if not _SHA.fullmatch(sha):
            raise BlobError(f"{sha!r} is not a blob name: those are SHA-256 sums, 64 lower-case hex digits")
        return self.root / sha[:2] / sha

    def put(self, data: bytes) -> str:
        """Store ``data`` (once, however often it is put) and return its SHA-256. Raises LedgerError."""
        sha = hashlib.sha256(data).hexdigest()
        path = self.path(sha)
        try:
            make_dirs(path.parent)
            if self._intact(path, sha):
                # Whoever wrote it may have been killed before the folder entry was durable.
                fsync_dir(path.parent)
            else:
                atomic_write(path, data, mode=0o444)
        except OSError as error:
            raise explain(error, path, "store a blob at") from error
        return sha

    def get(self, sha: str) -> bytes:
        """The content of ``sha``, checked against its name. Raises BlobError."""
        path = self.path(sha)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise BlobError(
                f"blob {sha} is not in {self.root}: restore that folder from a backup; "
                "the ledger itself is not affected"
            ) from None
        except OSError as error:
            raise explain(error, path, "read") from error
        if hashlib.sha256(data).hexdigest() != sha:
            raise BlobError(f"blob {path} is damaged: its SHA-256 is not its name; restore it from a backup")
        return data

    def __contains__(self, sha: str) -> bool:
        return self.path(sha).is_file()

    def names(self) -> Iterator[str]:
        """Every blob's name, sorted. Stray files (a killed writer's temporary ones) are passed over."""
        if self.root.is_dir():
            for item in sorted(self.root.glob("??/*")):
                if _SHA.fullmatch(item.name) and item.parent.name == item.name[:2]:
                    yield item.name

    def verify(self) -> list[str]:
        """One line for every damaged blob; empty when all is well. Raises LedgerError if unreadable."""
        problems: list[str] = []
        for sha in self.names():
            try:
                self.get(sha)
            except BlobError as error:
                problems.append(str(error))
        return problems

    @staticmethod
    def _intact(path: Path, sha: str) -> bool:
        try:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha:
                    return False
                os.fsync(file.fileno())
                return True
        except FileNotFoundError:
            return False
