"""Where documents come from: the embedded corpus, ``docs.jsonl(.zst)``, plain text files.

A :class:`Source` can be read any number of times and gives the same documents in the same order each time.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import zstandard

from trainer.data.errors import DataError

EMBEDDED = "embedded"
MIN_EMBEDDED_BYTES = 3_000_000
TEXT_SUFFIXES = (".txt", ".md")

# Left out of the embedded corpus: tests (some distributions strip them), generated tables, things that exist
# only with Tk, and whatever is not part of Python itself.
_SKIP_DIRS = frozenset({
    "test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "encodings",
    "site-packages", "dist-packages", "__pycache__",
    "pydoc_data",  # holds one module: its texts are taken out of it below
})
_SKIP_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")  # machine-specific
_MIN_DOCUMENT_BYTES = 200  # empty __init__ files and stubs
_LONG_LINE = 30  # characters; shorter lines recur everywhere and say nothing about copying
_NEAR_DUPLICATE = 0.5  # share of a document's distinct long lines that already occurred
_LONG_FILE_BYTES = 64_000  # a plain file above this is cut at blank lines ...
_PIECE_BYTES = 16_000  # ... into documents of about this size
_READ_BYTES = 1 << 20


class CorpusError(DataError):
    """A corpus that cannot be read; the message names file, line and what is valid."""


class Source(Protocol):
    """A re-readable sequence of documents."""

    @property
    def description(self) -> str:
        """In words, without machine paths; kept in the manifest."""
        ...

    @property
    def done(self) -> float:
        """How far the current iteration has come, 0 to 1; for progress only."""
        ...

    def __iter__(self) -> Iterator[str]: ...


def open_source(spec: str | Path) -> Source:
    """``"embedded"``, a ``.jsonl`` or ``.jsonl.zst`` file, a ``.txt`` or ``.md`` file, or a folder of those.

    Raises CorpusError when it is none of these.
    """
    if spec == EMBEDDED:
        version = platform.python_version()
        return TextSource(f"embedded: standard library of Python {version}", embedded_documents())
    path = Path(spec)
    if path.is_file() and path.name.endswith((".jsonl", ".jsonl.zst")):
        return JsonlSource(path)
    if path.is_dir() or (path.is_file() and path.suffix in TEXT_SUFFIXES):
        return TextSource(f"text files: {path.name}", plain_documents(path))
    what = "no such file or folder" if not path.exists() else "unknown kind of file"
    raise CorpusError(f"{path}: {what}: expected {EMBEDDED!r}, docs.jsonl, docs.jsonl.zst, "
                      f"a {' or '.join(TEXT_SUFFIXES)} file or a folder of such files")


class TextSource:
    """Documents in memory, in order of the SHA-256 of their text: a shuffle that depends on nothing else."""

    def __init__(self, description: str, documents: Iterable[str]) -> None:
        self.description = description
        self.done = 0.0
        self._documents = sorted(documents, key=text_key)

    def __iter__(self) -> Iterator[str]:
        for i, text in enumerate(self._documents):
            self.done = i / len(self._documents)
            yield text
        self.done = 1.0


class JsonlSource:
    """``{"text": ...}`` a line, UTF-8, plain or zstd, streamed in file order; blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.description = f"JSON Lines: {path.name}"
        self.done = 0.0

    def __iter__(self) -> Iterator[str]:
        """Raises CorpusError with the line number for a line that is not UTF-8, not JSON, or without text."""
        for number, line in enumerate(self._lines(), start=1):
            if line.strip():
                yield self._parse(number, line)

    def _parse(self, number: int, line: bytes) -> str:
        where = f"{self.path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as e:
            raise CorpusError(f"{where}: not UTF-8: byte 0x{line[e.start]:02x} at {e.start}") from e
        except ValueError as e:
            raise CorpusError(f"{where}: not JSON ({e}); "
                              'expected one object a line: {"text": "..."}') from e
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            got = f"text = {text!r}" if isinstance(record, dict) else f"a JSON {type(record).__name__}"
            raise CorpusError(f"{where}: {got[:80]}: expected an object with a string field 'text'")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise CorpusError(f"{where}: text holds a lone surrogate U+{ord(text[e.start]):04X} at character "
                              f"{e.start}: not valid Unicode text") from e
        return text

    def _lines(self) -> Iterator[bytes]:
        rest = b""
        for chunk in self._chunks():
            head, newline, tail = chunk.rpartition(b"\n")
            if not newline:
                rest += chunk
                continue
            yield from (rest + head).split(b"\n")
            rest = tail
        if rest:
            yield rest

    def _chunks(self) -> Iterator[bytes]:
        try:
            size = max(1, self.path.stat().st_size)
            read = 0
            zst = _Zstd(self.path) if self.path.suffix == ".zst" else None
            with self.path.open("rb") as f:
                while chunk := f.read(_READ_BYTES):
                    read += len(chunk)
                    self.done = read / size
                    yield zst.feed(chunk) if zst else chunk
            if zst:
                zst.end()
        except OSError as e:
            raise CorpusError(f"{self.path}: cannot be read ({e.strerror or e})") from e


class _Zstd:
    """Decompression of one or more frames that notices a cut-off end, which stream readers pass over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._fresh = True  # nothing of the current frame was seen yet

    def feed(self, data: bytes) -> bytes:
        out: list[bytes] = []
        while data:
            if self._frame.eof:
                self._frame, self._fresh = zstandard.ZstdDecompressor().decompressobj(), True
            try:
                out.append(self._frame.decompress(data))
            except zstandard.ZstdError as e:
                raise CorpusError(f"{self._path}: not zstd data, or damaged ({e})") from e
            self._fresh = False
            data = self._frame.unused_data if self._frame.eof else b""
        return b"".join(out)

    def end(self) -> None:
        if self._fresh or not self._frame.eof:
            raise CorpusError(f"{self._path}: the compressed file ends early; fetch it again")


def text_key(text: str) -> bytes:
    """SHA-256 of the text's UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).digest()


def plain_documents(path: Path) -> Iterator[str]:
    """Documents of a text file, or of all .txt and .md files below a folder; long files are :func:`cut`.

    The caller holds all of them in memory: for more than a few gigabytes write docs.jsonl, which streams.
    Raises CorpusError for a file that is not UTF-8, and for a folder without text files.
    """
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
    if not files:
        raise CorpusError(f"{path}: no {' or '.join(TEXT_SUFFIXES)} files in this folder")
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8")
        except OSError as e:
            raise CorpusError(f"{file}: cannot be read ({e.strerror or e})") from e
        except UnicodeDecodeError as e:
            line = e.object[: e.start].count(b"\n") + 1
            raise CorpusError(f"{file}, line {line}: not UTF-8: byte 0x{e.object[e.start]:02x}; "
                              "convert the file") from e
        yield from cut(text)


def cut(text: str) -> Iterator[str]:
    """The text itself, or, above 64 kB, pieces of whole paragraphs of about 16 kB; joined, the same text."""
    if len(text.encode("utf-8")) <= _LONG_FILE_BYTES:
        yield text
        return
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line.encode("utf-8"))
        # without blank lines (poems, logs) a piece ends at any line once it is twice as long
        if size >= _PIECE_BYTES and (not line.strip() or size >= 2 * _PIECE_BYTES):
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def embedded_documents(stdlib: Path | None = None) -> list[str]:
    """Text of the running Python's standard library: modules whole, and each help topic of pydoc.

    Near-duplicates are left out: a document more than half of whose long lines occur in longer ones. Raises
    CorpusError when less than 3 MB remain.
    """
    root = stdlib if stdlib is not None else Path(sysconfig.get_path("stdlib"))
    documents = distinct(_stdlib_texts(root))
    size = sum(len(t.encode("utf-8")) for t in documents)
    if size < MIN_EMBEDDED_BYTES:
        raise CorpusError(
            f"{root}: the standard library holds {size:,} bytes of source text, the embedded corpus needs "
            f"{MIN_EMBEDDED_BYTES:,}: this Python was stripped of its sources. Use another Python, or give a "
            "corpus of your own (docs.jsonl or a folder of .txt files)")
    return documents


def _stdlib_texts(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        skip = relative.name.startswith(_SKIP_PREFIXES) or relative.parts[0].startswith("config-")
        if skip or _SKIP_DIRS & set(relative.parts):
            continue
        try:
            yield path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except (OSError, UnicodeDecodeError):
            continue  # a Python with an unreadable or oddly encoded module still has plenty of others
    try:
        module = ast.parse((root / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
        literals = [n.value for n in module.body if isinstance(n, ast.Assign)]
        topics = ast.literal_eval(literals[0])  # topics = {"assert": "The \"assert\" statement ...", ...}
    except (OSError, ValueError, SyntaxError, IndexError):
        return  # stripped by some distributions: a pity, not an error
    if isinstance(topics, dict):
        yield from (t for t in topics.values() if isinstance(t, str))


def distinct(texts: Iterable[str]) -> list[str]:
    """Drop short documents, exact duplicates and near-duplicates; the longer of two alike is kept.

    The result does not depend on the order of ``texts`` and comes longest first.
    """
    ordered = sorted(((t, text_key(t)) for t in texts), key=lambda pair: (-len(pair[0]), pair[1]))
    kept: list[str] = []
    keys: set[bytes] = set()
    seen: set[str] = set()
    for text, key in ordered:
        if key in keys or len(text.encode("utf-8")) < _MIN_DOCUMENT_BYTES:
            continue
        keys.add(key)
        lines = {s for line in text.splitlines() if len(s := line.strip()) >= _LONG_LINE}
        if lines and len(lines & seen) > _NEAR_DUPLICATE * len(lines):
            continue
        seen |= lines
        kept.append(text)
    return kept
