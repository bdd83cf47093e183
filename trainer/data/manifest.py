"""``manifest.json``: what a data folder of ours holds, and the fingerprint that makes two numbers comparable.

The fingerprint covers content only (hashes and sizes of shards and tokenizer, and which split they belong
to): two folders with equal bytes share it, wherever and whenever they were built.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.errors import DataError
from trainer.data.shards import HEADER_BYTES, SPLITS, ShardError, parse_shard_name, read_header

MANIFEST_FILE = "manifest.json"
KIND = "autoresearch-data"
VERSION = 1


class ManifestError(DataError):
    """A manifest that cannot be read, or a folder that is not what its manifest says."""


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One shard file: its name inside the folder, SHA-256 and size of the file, number of tokens."""

    path: str
    sha256: str
    bytes: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """One split. ``raw_bytes`` is UTF-8 of the documents as read, ``text_bytes`` of the normalised text."""

    documents: int
    raw_bytes: int
    text_bytes: int
    shards: tuple[ShardInfo, ...]

    @property
    def tokens(self) -> int:
        return sum(s.tokens for s in self.shards)


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """The tokenizer file. ``kind``: "trained" on this train split, or "given" by the user."""

    path: str
    sha256: str
    bytes: int
    vocab_size: int
    kind: str
    train_documents: int  # documents its training looked at; 0 when given
    train_bytes: int  # UTF-8 bytes of those


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A built data folder. Holds neither machine paths nor times: equal inputs give an equal file."""

    kind: str
    version: int
    builder_version: int
    name: str
    source: str  # in words
    source_sha256: str  # over every document read, in order
    request_sha256: str  # over source and every setting: says whether a second build asks for the same
    dropped_documents: int  # empty ones and exact duplicates
    bos_id: int
    tokenizer: TokenizerInfo
    splits: Mapping[str, SplitInfo]  # keys of SPLITS; a split without documents is absent
    fingerprint: str

    def save(self, folder: Path) -> None:
        """Write ``folder/manifest.json`` atomically and durably."""
        path = folder / MANIFEST_FILE
        tmp = folder / f".{MANIFEST_FILE}.tmp{os.getpid()}"
        with tmp.open("w", encoding="utf-8") as f:
            json.dump(dataclasses.asdict(self), f, indent=1, sort_keys=True, ensure_ascii=False)
            f.write("\n")
            f.flush()
            os.fsync(f.fileno())
        tmp.replace(path)

    def problems(self, folder: Path, full: bool = False) -> Iterator[str]:
        """Yield each difference between ``folder`` and this manifest, in words; nothing when all is well.

        Quick: existence, file sizes and shard headers. ``full``: SHA-256 of every file as well.
        """
        files = [("tokenizer", self.tokenizer.path, self.tokenizer.bytes, self.tokenizer.sha256)]
        for split, info in self.splits.items():
            files += [(f"{split} shard", s.path, s.bytes, s.sha256) for s in info.shards]
        for what, name, size, sha in files:
            path = folder / name
            try:
                actual = path.stat().st_size
                digest = file_sha256(path) if full and actual == size else sha
            except OSError as e:
                yield f"{path}: {what} named in the manifest: {e.strerror or e}"
                continue
            if actual != size:
                yield f"{path}: size = {actual} bytes, manifest says {size}"
            elif digest != sha:
                yield f"{path}: sha256 = {digest}, manifest says {sha}: the file was changed or damaged"
        for info in self.splits.values():
            for s in info.shards:
                try:
                    count = read_header(folder / s.path).tokens
                except ShardError as e:
                    yield str(e)
                    continue
                if count != s.tokens:
                    yield f"{folder / s.path}: token count = {count}, manifest says {s.tokens}"

    def verify(self, folder: Path, full: bool = False) -> None:
        """Raise ManifestError with the first of :meth:`problems`."""
        for problem in self.problems(folder, full):
            raise ManifestError(f"{problem}; delete {folder} and build it again")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hex. Raises OSError."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def canonical_sha256(value: Any) -> str:
    """SHA-256 of JSON with sorted keys and no spaces: equal values, equal hash."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def content_fingerprint(tokenizer: TokenizerInfo, splits: Mapping[str, SplitInfo], bos_id: int) -> str:
    """SHA-256 over content hashes, sizes, tokenizer and split layout; file names take no part."""
    return canonical_sha256({
        "kind": KIND,
        "bos_id": bos_id,
        "tokenizer": [tokenizer.sha256, tokenizer.vocab_size],
        "splits": {n: [[s.sha256, s.bytes, s.tokens] for s in i.shards] for n, i in splits.items()},
    })


def is_ours(data: object) -> bool:
    """Whether parsed JSON is a manifest of ours (the challenge's own manifest.json is not)."""
    return isinstance(data, dict) and data.get("kind") == KIND


def load_manifest(folder: Path) -> Manifest:
    """Read ``folder/manifest.json`` and check every field, the fingerprint and the file names.

    Raises ManifestError naming file, field, value and what is valid. Does not look at the other files:
    that is :meth:`Manifest.verify`.
    """
    path = folder / MANIFEST_FILE
    data = read_json(path)
    if not is_ours(data):
        kind = data.get("kind") if isinstance(data, dict) else type(data).__name__
        raise ManifestError(f"{path}: kind = {kind!r}, expected {KIND!r}")
    try:
        if data.get("version") != VERSION:
            raise ManifestError(f"version = {data.get('version')!r}, expected {VERSION}: "
                                "written by another version of autoresearch; build the data again")
        manifest = _manifest(data)
    except ManifestError as e:
        raise ManifestError(f"{path}: {e}") from None
    return manifest


def read_json(path: Path) -> Any:
    """Parse a JSON file; ManifestError when it is unreadable or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ManifestError(f"{path}: cannot be read ({e.strerror or e})") from e
    except ValueError as e:
        raise ManifestError(f"{path}: not JSON ({e})") from e


def _manifest(data: dict[str, Any]) -> Manifest:
    splits_in = data.get("splits")
    if not isinstance(splits_in, dict):
        raise ManifestError(f"splits = {splits_in!r}: expected an object")
    if unknown := sorted(set(splits_in) - set(SPLITS)):
        raise ManifestError(f"splits: unknown split {unknown[0]!r}, expected some of {', '.join(SPLITS)}")
    if "train" not in splits_in:
        raise ManifestError("splits: no 'train' split")
    splits = {n: _split(n, splits_in[n]) for n in SPLITS if n in splits_in}
    tokenizer = _fill(TokenizerInfo, "tokenizer", data.get("tokenizer"), {})
    _plain_name("tokenizer.path", tokenizer.path)
    manifest = _fill(Manifest, "", data, {"splits": splits, "tokenizer": tokenizer})
    expected = content_fingerprint(tokenizer, splits, manifest.bos_id)
    if manifest.fingerprint != expected:
        raise ManifestError(f"fingerprint = {manifest.fingerprint!r}, but the content listed gives "
                            f"{expected!r}: the manifest was edited; build the data again")
    return manifest


def _split(name: str, data: object) -> SplitInfo:
    where = f"splits.{name}"
    shards_in = data.get("shards") if isinstance(data, dict) else None
    if not isinstance(shards_in, list) or not shards_in:
        raise ManifestError(f"{where}.shards = {shards_in!r}: expected a list of at least one shard")
    shards = tuple(_fill(ShardInfo, f"{where}.shards[{i}]", s, {}) for i, s in enumerate(shards_in))
    for i, s in enumerate(shards):
        _plain_name(f"{where}.shards[{i}].path", s.path)
        parsed = parse_shard_name(s.path)
        if parsed is None or parsed[1] != name:
            raise ManifestError(f"{where}.shards[{i}].path = {s.path!r}: "
                                f"expected <name>_{name}_<6 digits>.bin")
        if s.bytes != HEADER_BYTES + 2 * s.tokens:
            raise ManifestError(f"{where}.shards[{i}].bytes = {s.bytes}: "
                                f"expected {HEADER_BYTES + 2 * s.tokens} for tokens = {s.tokens}")
    return _fill(SplitInfo, where, data, {"shards": shards})


def _plain_name(where: str, value: str) -> None:
    if value != Path(value).name or value in ("", ".", ".."):
        raise ManifestError(f"{where} = {value!r}: expected a file name inside the folder, without '/'")


T = typing.TypeVar("T", ShardInfo, SplitInfo, TokenizerInfo, Manifest)


def _fill(cls: type[T], where: str, data: object, parsed: Mapping[str, Any]) -> T:
    """Build ``cls`` from a JSON object: fields in ``parsed`` are built already, others str or int >= 0."""
    if not isinstance(data, dict):
        raise ManifestError(f"{where or 'manifest'} = {data!r}: expected an object")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        dotted = f"{where}.{f.name}" if where else f.name
        if f.name in parsed:
            values[f.name] = parsed[f.name]
            continue
        if f.name not in data:
            raise ManifestError(f"{dotted}: missing field")
        value, hint = data[f.name], hints[f.name]
        if not isinstance(value, hint) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            expected = "a string" if hint is str else "an integer >= 0"
            raise ManifestError(f"{dotted} = {value!r}: expected {expected}")
        values[f.name] = value
    return cls(**values)
