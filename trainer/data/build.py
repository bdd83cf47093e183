"""From documents to a data folder: shards for every split, tokenizer, manifest.

Equal documents and settings give equal bytes in every file, whatever the folder, the machine's load or the
number of threads. The folder appears at once, by a rename, when it is complete and on disk: a build killed
at any moment leaves at most a hidden sibling, which the next build of the same folder removes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
import uuid
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece as spm

from trainer.data.bytecount import ByteTable, load_processor
from trainer.data.corpus import Source, open_source
from trainer.data.errors import DataError
from trainer.data.manifest import (
    KIND,
    MANIFEST_FILE,
    VERSION,
    Manifest,
    ShardInfo,
    SplitInfo,
    TokenizerInfo,
    canonical_sha256,
    content_fingerprint,
    load_manifest,
)
from trainer.data.shards import HEADER_BYTES, MAX_TOKENS, SPLITS, parse_shard_name, shard_name, write_shard
from trainer.data.splits import DROPPED, assign, first_occurrences
from trainer.data.tokenizer import train_tokenizer

BUILDER_VERSION = 1  # raise it when equal inputs give other bytes than before
DEFAULT_VOCAB = 1024
TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_BYTES = 20_000_000  # train text that the tokenizer's training looks at, from the front
_BATCH_BYTES = 4_000_000  # text encoded per call: bounds memory, keeps every core busy

Progress = Callable[[str, float], None]


class BuildError(DataError):
    """A build that cannot start or go on because of what was asked for or what is in the way."""


@dataclass(frozen=True)
class _Request:
    """Everything besides the documents that decides the bytes of the result."""

    name: str
    vocab_size: int
    tokenizer: bytes | None  # a given model, else train one
    counts: dict[str, int | None]
    shard_tokens: int
    tokenizer_bytes: int
    drop_duplicates: bool

    def sha256(self, source_sha256: str) -> str:
        return canonical_sha256({
            "builder": BUILDER_VERSION, "source": source_sha256, "name": self.name,
            "vocab_size": self.vocab_size,
            "tokenizer": hashlib.sha256(self.tokenizer).hexdigest() if self.tokenizer is not None else None,
            "counts": self.counts, "shard_tokens": self.shard_tokens, "tokenizer_bytes": self.tokenizer_bytes,
            "drop_duplicates": self.drop_duplicates,
        })


@dataclass(frozen=True)
class _Scan:
    """What one pass over the documents found."""

    lengths: npt.NDArray[np.int64]  # UTF-8 bytes of each document
    keep: npt.NDArray[np.bool_]  # False: empty, or an exact repeat of an earlier one
    sha256: str  # over all documents, in order


def build(
    source: Source | str | Path,
    out_dir: Path,
    vocab_size: int | None = None,
    *,
    name: str = "fineweb",
    tokenizer_model: Path | None = None,
    val_docs: int | None = None,
    dev_docs: int | None = None,
    holdout_docs: int | None = None,
    shard_tokens: int = 100_000_000,
    tokenizer_bytes: int = TOKENIZER_BYTES,
    drop_duplicates: bool = True,
    progress: Progress | None = None,
) -> Manifest:
    """Build ``out_dir`` from ``source`` (see :func:`~trainer.data.corpus.open_source`); return its manifest.

    ``vocab_size``: pieces to train (default 1,024); with ``tokenizer_model`` that model is used as it is, and
    its own size holds. ``val_docs`` = N makes the first N documents the val split, as in the challenge; the
    next are holdout, then dev, the rest is train; without counts each is a share of the bytes (see
    ``splits``). ``drop_duplicates=False`` keeps repeated documents, as the published exports do.
    ``progress(stage, share)`` is called with stages "wait", "read", "tokenizer", "encode", "done".

    If ``out_dir`` already holds the result of the same request, it is checked quickly and returned. Two
    builds of one folder at the same time: the second waits for the first and takes its result.
    Raises DataError (BuildError, CorpusError, TokenizerError, ByteTableError, SplitError, ManifestError).
    """
    out_dir = Path(out_dir).absolute()
    tell = progress or (lambda stage, share: None)
    counts = {"val": val_docs, "holdout": holdout_docs, "dev": dev_docs}
    request = _request(
        name, vocab_size, tokenizer_model, counts, shard_tokens, tokenizer_bytes, drop_duplicates)
    started = time.monotonic()
    if isinstance(source, str | Path):
        source = open_source(source)
    scan = _scan(source, drop_duplicates, tell)
    wanted = request.sha256(scan.sha256)
    if existing := _existing(out_dir, wanted):
        tell("done", 1.0)
        return existing
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with _lock(out_dir, tell):
        if existing := _existing(out_dir, wanted):  # another build finished it in the meantime
            tell("done", 1.0)
            return existing
        _remove_leftovers(out_dir)
        temp = out_dir.with_name(f"{_temp_prefix(out_dir)}{uuid.uuid4().hex}")
        temp.mkdir()
        try:
            manifest = _write(source, scan, request, wanted, temp, tell)
            manifest.save(temp)
            _fsync(temp)
            temp.rename(out_dir)  # an empty out_dir is replaced, anything else would be an error
            _fsync(out_dir.parent)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
    tell(f"done in {time.monotonic() - started:.1f} s", 1.0)
    return manifest


def _request(
    name: str, vocab_size: int | None, model: Path | None, counts: dict[str, int | None], shard_tokens: int,
    tokenizer_bytes: int, drop_duplicates: bool,
) -> _Request:
    """Check the arguments of :func:`build`."""
    if parse_shard_name(shard_name(name, "train", 0)) != (name, "train", 0) or Path(name).name != name:
        raise BuildError(f"name = {name!r}: expected a plain word for file names, like 'fineweb'")
    for split, count in counts.items():
        least = 1 if split == "val" else 0
        if count is not None and count < least:
            raise BuildError(f"{split}_docs = {count}: expected {least} or more")
    if not 1 <= shard_tokens <= MAX_TOKENS:
        raise BuildError(f"shard_tokens = {shard_tokens}: expected 1 to {MAX_TOKENS}")
    if tokenizer_bytes < 1:
        raise BuildError(f"tokenizer_bytes = {tokenizer_bytes}: expected 1 or more")
    if model is None:
        return _Request(name, vocab_size or DEFAULT_VOCAB, None, counts, shard_tokens, tokenizer_bytes,
                        drop_duplicates)
    own = load_processor(model).vocab_size()
    if vocab_size is not None and vocab_size != own:
        raise BuildError(f"vocab_size = {vocab_size}, but {model} has {own} pieces: leave vocab_size out")
    return _Request(name, own, model.read_bytes(), counts, shard_tokens, tokenizer_bytes, drop_duplicates)


def _scan(source: Source, drop_duplicates: bool, tell: Progress) -> _Scan:
    """Read every document once: lengths, repeats, and one hash over everything."""
    lengths, keys = array("q"), array("Q")
    whole = hashlib.sha256()
    tell("read", 0.0)
    for i, text in enumerate(source):
        data = text.encode("utf-8")
        digest = hashlib.sha256(data).digest()
        whole.update(digest)
        # blank documents get length 0: nothing would be encoded from them
        lengths.append(len(data) if text.strip(" \t\r\n\x00") else 0)
        keys.append(int.from_bytes(digest[:8], "little"))
        if i % 512 == 0:
            tell("read", source.done)
    sizes = np.asarray(lengths, dtype=np.int64)
    keep = sizes > 0
    if drop_duplicates:
        keep &= first_occurrences(keys)
    if not keep.any():
        raise BuildError(f"{source.description}: no documents with text")
    tell("read", 1.0)
    return _Scan(sizes, keep, whole.hexdigest())


def _write(
    source: Source, scan: _Scan, request: _Request, request_sha256: str, folder: Path, tell: Progress
) -> Manifest:
    """Fill ``folder`` with tokenizer and shards; return the manifest, not yet saved."""
    assignment = assign(scan.lengths, scan.keep, request.counts)
    model, train_docs, train_bytes = request.tokenizer, 0, 0
    if model is None:
        tell("tokenizer", 0.0)
        texts = _sample(source, scan, assignment, request.tokenizer_bytes)
        train_docs, train_bytes = len(texts), sum(len(t.encode("utf-8")) for t in texts)
        model = train_tokenizer(texts, request.vocab_size)
        tell("tokenizer", 1.0)
    sp = load_processor(model)
    table = ByteTable.from_processor(sp)
    if sp.bos_id() < 0:
        raise BuildError("tokenizer: bos_id = -1: it has no BOS piece, and every document starts with one "
                         "(id 1 in the challenge)")
    _write_file(folder / TOKENIZER_FILE, model)
    writers = {split: _SplitWriter(folder, request.name, split, request.shard_tokens) for split in SPLITS}
    _encode(source, scan, assignment, sp, table, writers, tell)
    splits = {split: info for split, w in writers.items() if (info := w.close()) is not None}
    tokenizer = TokenizerInfo(
        path=TOKENIZER_FILE, sha256=hashlib.sha256(model).hexdigest(), bytes=len(model),
        vocab_size=sp.vocab_size(), kind="given" if request.tokenizer is not None else "trained",
        train_documents=train_docs, train_bytes=train_bytes,
    )
    return Manifest(
        kind=KIND, version=VERSION, builder_version=BUILDER_VERSION, name=request.name,
        source=source.description, source_sha256=scan.sha256, request_sha256=request_sha256,
        dropped_documents=int((~scan.keep).sum()),
        bos_id=sp.bos_id(), tokenizer=tokenizer, splits=splits,
        fingerprint=content_fingerprint(tokenizer, splits, sp.bos_id()),
    )


def _sample(source: Source, scan: _Scan, assignment: npt.NDArray[np.uint8], limit: int) -> list[str]:
    """The first train documents, until ``limit`` bytes are passed."""
    train = SPLITS.index("train")
    texts: list[str] = []
    size = 0
    for text, code, length in zip(source, assignment, scan.lengths, strict=True):
        if code == train:
            texts.append(text)
            size += int(length)
            if size >= limit:
                return texts
    return texts


def _encode(
    source: Source, scan: _Scan, assignment: npt.NDArray[np.uint8], sp: spm.SentencePieceProcessor,
    table: ByteTable, writers: dict[str, _SplitWriter], tell: Progress,
) -> None:
    """Tokenize every kept document as BOS + ids, in order, each to its split's writer."""
    texts: list[str] = []
    codes: list[int] = []
    size = done = 0
    total = int(scan.lengths[scan.keep].sum())
    whole = hashlib.sha256()

    def flush() -> None:
        nonlocal size, done
        for text, code, ids in zip(texts, codes, sp.encode(texts, out_type=int), strict=True):
            tokens = np.empty(len(ids) + 1, dtype=np.uint16)
            tokens[0], tokens[1:] = sp.bos_id(), ids
            writers[SPLITS[code]].add(tokens, len(text.encode("utf-8")), table.count_stream(tokens))
        done += size
        size = 0
        texts.clear()
        codes.clear()
        tell("encode", done / total)

    tell("encode", 0.0)
    for text, code, length in zip(source, assignment, scan.lengths, strict=True):
        whole.update(hashlib.sha256(text.encode("utf-8")).digest())
        if code == DROPPED:
            continue
        texts.append(text)
        codes.append(int(code))
        size += int(length)
        if size >= _BATCH_BYTES:
            flush()
    flush()
    if whole.hexdigest() != scan.sha256:
        raise BuildError(f"{source.description}: the documents changed while they were being read; "
                         "build again")


class _SplitWriter:
    """Collects one split's tokens and writes a shard whenever ``shard_tokens`` are there."""

    def __init__(self, folder: Path, name: str, split: str, shard_tokens: int) -> None:
        self._folder, self._name, self._split, self._limit = folder, name, split, shard_tokens
        self._pending: list[npt.NDArray[np.uint16]] = []
        self._size = 0
        self._documents = self._raw = self._text = 0
        self._shards: list[ShardInfo] = []

    def add(self, tokens: npt.NDArray[np.uint16], raw_bytes: int, text_bytes: int) -> None:
        self._documents += 1
        self._raw += raw_bytes
        self._text += text_bytes
        self._pending.append(tokens)
        self._size += len(tokens)
        if self._size >= self._limit:
            self._flush(final=False)

    def close(self) -> SplitInfo | None:
        """Write what is left; None when the split got no document."""
        self._flush(final=True)
        if not self._shards:
            return None
        return SplitInfo(documents=self._documents, raw_bytes=self._raw, text_bytes=self._text,
                         shards=tuple(self._shards))

    def _flush(self, final: bool) -> None:
        if not self._size:
            return
        tokens = np.concatenate(self._pending)
        start = 0
        while len(tokens) - start >= self._limit or (final and start < len(tokens)):
            part = tokens[start : start + self._limit]
            path = self._folder / shard_name(self._name, self._split, len(self._shards))
            self._shards.append(ShardInfo(path=path.name, sha256=write_shard(path, part),
                                          bytes=HEADER_BYTES + 2 * len(part), tokens=len(part)))
            start += len(part)
        self._pending, self._size = [tokens[start:]], len(tokens) - start


def _existing(out_dir: Path, request_sha256: str) -> Manifest | None:
    """The manifest, if ``out_dir`` is the finished result of this request; None if there is nothing yet."""
    if not out_dir.exists():
        return None
    if not out_dir.is_dir():
        raise BuildError(f"{out_dir}: is a file; give the name of a folder")
    if not any(out_dir.iterdir()):
        return None
    if not (out_dir / MANIFEST_FILE).is_file():
        raise BuildError(f"{out_dir}: not empty, and no {MANIFEST_FILE} in it: give another folder or "
                         "empty this one")
    manifest = load_manifest(out_dir)
    if manifest.request_sha256 != request_sha256:
        raise BuildError(
            f"{out_dir}: holds other data ({manifest.source}; fingerprint {manifest.fingerprint[:12]}), "
            "made from another source or with other settings: give another folder or delete this one")
    manifest.verify(out_dir)
    return manifest


def _temp_prefix(out_dir: Path) -> str:
    return f".{out_dir.name}.building-"


def _remove_leftovers(out_dir: Path) -> None:
    """Delete half-built siblings. Only under the lock: then their builders are dead."""
    for p in out_dir.parent.iterdir():
        if p.name.startswith(_temp_prefix(out_dir)):
            shutil.rmtree(p, ignore_errors=True)


@contextmanager
def _lock(out_dir: Path, tell: Progress) -> Iterator[None]:
    """Hold ``.<folder>.lock`` beside the folder; the kernel lets go of it when the process dies."""
    with out_dir.with_name(f".{out_dir.name}.lock").open("a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("wait", 0.0)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _fsync(folder: Path) -> None:
    """Make a folder's entries durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
